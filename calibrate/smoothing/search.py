"""Searches smoothing factors: channels with large values are divided before rounding, and their weights multiplied.

SmoothQuant (Xiao et al., SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models,
arXiv 2211.10438, 2022): y = W x = (W * s) (x / s) with s[k] = max|x[k]|**alpha / max|W[:, k]|**(1 - alpha).

Layers that share an input share its factors. alpha is searched for each such group: ranges and factors come from the
calls that are not held out, the error of the integer layers' outputs from rows of held-out calls. So factors that only
fit the calls they were made from are not chosen.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

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
from .fold import FoldGroup

ALPHAS = (0.3, 0.45, 0.6, 0.75, 0.9)  # values of alpha that are tried
_WORTH = 0.9  # keep smoothing only if it lowers the output error by at least 10 %: it may cost a multiplication
_NEAR = 1.07  # the smallest alpha whose error is within 7 % of the best is taken: it depends least on the calls
_APART = 0.8  # separate factors have to lower the error by 20 % against common ones, which could be folded away
_MOST = 2.0**12  # largest ratio between the median factor and any other factor


class Smoothing(NamedTuple):
    """The smoothing of a layer: `transform` multiplies each channel of the input by 1 / s, held in the model's dtype;
    `gain` is the improvement in dB."""

    transform: Multiply
    alpha: float
    gain: float


def smooth(
    model: nn.Module,
    surveys: Mapping[str, Survey],
    groups: Iterable[FoldGroup],
    kind: type[Input],
    scheme: Scheme,
    work: Work,
) -> dict[str, Smoothing]:
    """Finds the smoothing of each layer that gains by smoothing. Inputs become codes of `scheme` in the way `kind`.

    Layers with one row for each sample are left alone: their few rows say too little about other calls. Layers of a
    group with different inputs get their own factors where these are much better: the blocks of a network may have no
    large channels in common. Collective: the ranks of `work` share the groups.
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


def grouped(surveys: Mapping[str, Survey], groups: Iterable[FoldGroup]) -> Iterable[list[str]]:
    """Yields the names of `surveys` whose input holds tokens: by groups, and the other layers by shared inputs."""
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
    """Judges factors for layers with one input, on rows of held-out calls, by the squared errors of the outputs over
    the squares of the float outputs.

    The products are those of the integer layers, up to the rounding of scales.
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
        """The sum of the layers' errors; infinite where a layer has no integer form."""
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
    """The product of the codes of `x` and of the weight, without the bias; None where the weight has no codes."""
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
    """Searches the best smoothing of these layers, None where none helps enough; returns it with the sum of errors."""
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
    """The largest |W| of each input channel, (in,), over weights (out, in)."""
    each = [torch.maximum(weight.amax(0), weight.amin(0).neg()) for weight in weights]
    return torch.stack(each).amax(0)


def multiplier_of(weight: Tensor, inputs: Channels, alpha: float) -> Tensor:
    """The multiplier 1 / s (in,), rounded to the model's dtype, so that weights are divided by the same numbers.

    `weight` is the result of `largest_of`. The median s is 1; so is s for channels that are always zero or have no
    weights.
    """
    largest, weights = torch.maximum(inputs.high, inputs.low.neg()).to(torch.float64), weight.to(torch.float64)
    used = (largest > 0) & (weights > 0)
    if not bool(used.any()):
        return torch.ones_like(largest, dtype=weight.dtype)
    s = largest.clamp(min=1e-30) ** alpha / weights.clamp(min=1e-30) ** (1 - alpha)
    s = (s / s[used].median()).clamp(1 / _MOST, _MOST)
    return torch.where(used, 1 / s, 1.0).to(weight.dtype)
