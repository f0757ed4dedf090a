"""Smoothing: channels whose values are large are divided before they are rounded, and their weights multiplied.

SmoothQuant (Xiao et al., SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models,
arXiv 2211.10438, 2022): y = W x = (W * s) (x / s) with s[k] = max|x[k]|**alpha / max|W[:, k]|**(1 - alpha).

Layers that share an input share its factors. alpha is searched for each such group: ranges and factors from the calls
that choices may look at, the error of the integer layers' outputs on rows of the others. So a division that only fits
the calls it was made from is not chosen.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.inputs import Codes, Input, StaticInput, weights_for
from ..layers.products import integer_matmul
from ..layers.scheme import QParams, Scheme, codes, qparams_of
from ..layers.transforms import Multiply, transformed, weight_for
from ..layers.weights import scales_of
from ..observers.extremes import Channels
from ..observers.survey import Survey
from ..plan import FloatLayer, layer_at
from ..replay.work import Work

ALPHAS = (0.3, 0.45, 0.6, 0.75, 0.9)
_WORTH = 0.9  # of the error without smoothing: a multiply that saves less is not put in
_NEAR = 1.07  # of the smallest error: among those, the gentlest alpha is taken, which depends least on the calls
_APART = 0.8  # of the error with common factors: less is not worth a multiply that could be folded away
_MOST = 2.0**12  # between the middle factor and the largest, and the smallest


class Group(Protocol):
    """Layers that are given the same input, or inputs whose channels are to be divided by the same factors."""

    @property
    def layers(self) -> Sequence[str]: ...


class Smoothing(NamedTuple):
    """`transform` multiplies each channel of the input by 1 / s, held in the model's dtype; `gain` is in dB."""

    transform: Multiply
    alpha: float
    gain: float


def smooth(
    model: nn.Module,
    surveys: Mapping[str, Survey],
    groups: Iterable[Group],
    kind: type[Input],
    scheme: Scheme,
    work: Work,
) -> dict[str, Smoothing]:
    """The smoothing of each layer that gains by it. `kind` says how inputs become codes, of `scheme`.

    Layers that see one row for each sample are left alone: their few rows say too little of other calls. Layers of a
    group that are given different inputs have factors of their own where that is much better: those of all blocks of a
    network may have no channels in common that are large. Collective: the ranks of `work` share the groups.
    """
    chosen: dict[str, Smoothing] = {}
    found = work.ranks.share(list(grouped(surveys, groups)))
    for names in work.progress("smooth", found, len(found)):
        together, error = _searched(model, names, surveys, kind, scheme)
        made = {tuple(names): together}
        if len(parts := list(_by_input(names, surveys))) > 1:
            apart = {tuple(part): _searched(model, part, surveys, kind, scheme) for part in parts}
            if sum(each for _, each in apart.values()) < _APART * error:
                made = {part: smoothing for part, (smoothing, _) in apart.items()}
        for part, smoothing in made.items():
            if smoothing is not None:
                chosen.update(dict.fromkeys(part, smoothing))
    return {name: smoothing for part in work.ranks.gather(chosen) for name, smoothing in part.items()}


def grouped(surveys: Mapping[str, Survey], groups: Iterable[Group]) -> Iterable[list[str]]:
    """The names of `surveys` whose input holds tokens: by the groups, and the others by whose input they share."""
    able = {name for name, survey in surveys.items() if survey.seen and survey.tokens}
    for group in groups:
        names = [name for name in group.layers if name in able]
        able -= set(names)
        if names:
            yield names
    yield from _by_input([name for name in surveys if name in able], surveys)


def _by_input(names: Iterable[str], surveys: Mapping[str, Survey]) -> Iterable[list[str]]:
    shared: dict[str, list[str]] = {}
    for name in names:
        shared.setdefault(surveys[name].leader, []).append(name)
    return shared.values()


class _Judge:
    """Judges factors for layers with one input, on rows that they were not made from: the errors of their outputs, over
    their squares.

    The products are those of the integer layers, but for how their scales are rounded.
    """

    def __init__(self, modules: Sequence[FloatLayer], survey: Survey, kind: type[Input], scheme: Scheme) -> None:
        self._modules, self._survey, self._kind, self._scheme = modules, survey, kind, scheme
        self._rows = survey.judged.rows
        rows = self._rows.to(torch.float32)
        self._exact = [F.linear(rows, module.weight.detach().to(torch.float32)) for module in modules]
        self._signals = [
            _square(y if module.bias is None else y + module.bias.detach())
            for module, y in zip(modules, self._exact, strict=True)
        ]

    def error(self, transform: Multiply | None) -> float:
        """The sum over the layers; infinite where there are no integers."""
        x = self._codes(transform)
        if x is None:
            return math.inf
        total = 0.0
        for module, exact, signal in zip(self._modules, self._exact, self._signals, strict=True):
            made = _product(x, weight_for(transform, module.weight), weights_for(self._scheme))
            if made is None:
                return math.inf
            noise = _square(made.sub_(exact))
            total += noise / signal if signal else noise
        return total

    def _codes(self, transform: Multiply | None) -> Codes | None:
        x = transformed(transform, self._rows).to(torch.float32)
        if not self._kind.ranged:
            return self._kind(scheme=self._scheme).codes(x)
        extent = self._survey.fitted.range(transform)
        qparams = qparams_of(extent, self._scheme, self._modules[0].weight.dtype)
        return None if qparams is None else StaticInput(qparams, scheme=self._scheme).codes(x)


def _product(x: Codes, weight: Tensor, scheme: Scheme) -> Tensor | None:
    """What the codes of `x` and of the weight make, without the bias; None where the weight has none."""
    scale = scales_of(weight, scheme)
    if scale is None:
        return None
    q = codes(weight, QParams(scale, torch.zeros_like(scale)), scheme).to(scheme.element.dtype)
    total = integer_matmul(x.q.to(scheme.element.dtype), q)
    if x.zero_point is not None:
        total -= x.zero_point * q.sum(1, dtype=torch.int32)
    return total.to(torch.float32) * (x.scale * scale)


def _square(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def _searched(
    model: nn.Module, names: Sequence[str], surveys: Mapping[str, Survey], kind: type[Input], scheme: Scheme
) -> tuple[Smoothing | None, float]:
    """The best smoothing of these layers, if there is one that helps, and the sum of their errors with it."""
    weights = largest_of([layer_at(model, name).weight.detach() for name in names])
    fitted = _merged(surveys[name].fitted for name in names)
    judges = [
        _Judge([layer_at(model, name) for name in part], surveys[part[0]], kind, scheme)
        for part in _by_input(names, surveys)
    ]

    def error(transform: Multiply | None) -> float:
        return sum(judge.error(transform) for judge in judges)

    before = error(None)
    errors = [error(Multiply(multiplier_of(weights, fitted, alpha))) for alpha in ALPHAS]
    if not min(errors) < _WORTH * before:
        return None, before
    alpha, after = next((a, e) for a, e in zip(ALPHAS, errors, strict=True) if e <= _NEAR * min(errors))
    everything = _merged(surveys[name].all for name in names)
    gain = 10 * float(torch.tensor(before / max(after, 1e-300)).log10())
    return Smoothing(Multiply(multiplier_of(weights, everything, alpha)), alpha, gain), after


def _merged(statistics: Iterable[Channels]) -> Channels:
    merged = Channels()
    for each in statistics:
        merged.merge(each)
    return merged


def largest_of(weights: Sequence[Tensor]) -> Tensor:
    """The largest |W| (in,) of each input channel over weights (out, in)."""
    each = [torch.maximum(weight.amax(0), weight.amin(0).neg()) for weight in weights]
    return torch.stack(each).amax(0)


def multiplier_of(weight: Tensor, inputs: Channels, alpha: float) -> Tensor:
    """1 / s (in,) as the model's dtype holds it, the middle s being 1; so weights are divided by just that.

    `weight` is what `largest_of` says. s is 1 for channels that are always zero or have no weights.
    """
    largest, weights = torch.maximum(inputs.high, inputs.low.neg()).to(torch.float64), weight.to(torch.float64)
    used = (largest > 0) & (weights > 0)
    if not bool(used.any()):
        return torch.ones_like(largest, dtype=weight.dtype)
    s = largest.clamp(min=1e-30) ** alpha / weights.clamp(min=1e-30) ** (1 - alpha)
    s = (s / s[used].median()).clamp(1 / _MOST, _MOST)
    return torch.where(used, 1 / s, 1.0).to(weight.dtype)
