"""Smoothing: channels whose values are large are divided before they are rounded, and their weights multiplied.

SmoothQuant (Xiao et al., SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models,
arXiv 2211.10438, 2022): y = W x = (W * s) (x / s) with s[k] = max|x[k]|**alpha / max|W[:, k]|**(1 - alpha).

Layers that share an input share its factors. alpha is searched for each such group: ranges and factors from the calls
that choices may look at, the error of the integer layers' outputs on rows of the others. So a division that only fits
the calls it was made from is not chosen.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capture.ranks import ALONE, Ranks

from .calls import Progress
from .channels import Channels
from .choice import divided
from .freeze import Dynamic
from .integers import dynamic_codes, integer_matmul
from .plan import FloatLayer, layer_at
from .scheme import ACTIVATION, QParams, Scheme, codes, qparams_of
from .survey import Survey
from .weights import QuantizedWeight, round_to_nearest

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
    """`multiplier` (channels,), 1 / s in the model's dtype, is what the input is multiplied by; `gain` is in dB."""

    multiplier: Tensor
    alpha: float
    gain: float


def smooth(
    model: nn.Module,
    surveys: Mapping[str, Survey],
    groups: Iterable[Group],
    kind: str,
    scheme: Scheme,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> dict[str, Smoothing]:
    """The smoothing of each layer that gains by it. `kind` says how inputs become integers, with `scheme`.

    Layers that see one row for each sample are left alone: their few rows say too little of other calls. Layers of a
    group that are given different inputs have factors of their own where that is much better: those of all blocks of a
    network may have no channels in common that are large. Collective: `ranks` share the groups.
    """
    chosen: dict[str, Smoothing] = {}
    found = ranks.share(list(grouped(surveys, groups)))
    for names in progress("smooth", found, len(found)):
        together, error = _searched(model, names, surveys, kind, scheme)
        made = {tuple(names): together}
        if len(parts := list(_by_input(names, surveys))) > 1:
            apart = {tuple(part): _searched(model, part, surveys, kind, scheme) for part in parts}
            if sum(each for _, each in apart.values()) < _APART * error:
                made = {part: smoothing for part, (smoothing, _) in apart.items()}
        for part, smoothing in made.items():
            if smoothing is not None:
                chosen.update(dict.fromkeys(part, smoothing))
    return {name: smoothing for part in ranks.gather(chosen) for name, smoothing in part.items()}


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
    """Judges factors for one layer, on rows that they were not made from: the error of its output, over its square.

    The products are those of the integer layer, but for how its scales are rounded.
    """

    def __init__(self, module: FloatLayer, survey: Survey, kind: str, scheme: Scheme) -> None:
        self._module, self._survey, self._kind, self._scheme = module, survey, kind, scheme
        self._rows = survey.judged.rows
        self._product = F.linear(self._rows.to(torch.float32), module.weight.detach().to(torch.float32))
        exact = self._product if module.bias is None else self._product + module.bias.detach()
        self._signal = _square(exact)

    def error(self, multiplier: Tensor | None) -> float:
        """Infinite where there are no integers."""
        weight = divided(self._module, multiplier)
        extent = self._survey.fitted.range(multiplier)
        spec = Dynamic() if self._kind == "dynamic" else qparams_of(extent, self._scheme, self._module.weight.dtype)
        quantized = round_to_nearest(weight)
        if spec is None or quantized is None:
            return float("inf")
        x = (self._rows if multiplier is None else self._rows * multiplier).to(torch.float32)
        noise = _square(_product(x, quantized, spec) - self._product)
        return noise / self._signal if self._signal else noise


def _product(x: Tensor, weight: QuantizedWeight, spec: QParams | Dynamic) -> Tensor:
    """What the integers of `x` and of the weight make, without the bias."""
    if isinstance(spec, Dynamic):
        q, scale = dynamic_codes(x, (-1,))
        return integer_matmul(q, weight.weight).to(torch.float32) * (scale * weight.scale)
    spec = QParams(*(each.to(x.device) for each in spec))
    total = integer_matmul(codes(x, spec, ACTIVATION), weight.weight)
    total -= spec.zero_point * weight.weight.sum(1, dtype=torch.int32)
    return total.to(torch.float32) * (spec.scale * weight.scale)


def _square(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


def _searched(
    model: nn.Module, names: Sequence[str], surveys: Mapping[str, Survey], kind: str, scheme: Scheme
) -> tuple[Smoothing | None, float]:
    """The best smoothing of these layers, if there is one that helps, and the sum of their errors with it."""
    weights = [layer_at(model, name).weight.detach() for name in names]
    fitted = _merged(surveys[name].fitted for name in names)
    judges = [_Judge(layer_at(model, name), surveys[name], kind, scheme) for name in names]

    def error(multiplier: Tensor | None) -> float:
        return sum(judge.error(multiplier) for judge in judges)

    before = error(None)
    errors = [error(multiplier_of(weights, fitted, alpha)) for alpha in ALPHAS]
    if not min(errors) < _WORTH * before:
        return None, before
    alpha, after = next((a, e) for a, e in zip(ALPHAS, errors, strict=True) if e <= _NEAR * min(errors))
    everything = _merged(surveys[name].all for name in names)
    gain = 10 * float(torch.tensor(before / max(after, 1e-300)).log10())
    return Smoothing(multiplier_of(weights, everything, alpha), alpha, gain), after


def _merged(statistics: Iterable[Channels]) -> Channels:
    merged = Channels()
    for each in statistics:
        merged.merge(each)
    return merged


def multiplier_of(weights: Sequence[Tensor], inputs: Channels, alpha: float) -> Tensor:
    """1 / s (in,) as the model's dtype holds it, the middle s being 1; so weights are divided by just that.

    s is 1 for channels that are always zero or have no weights.
    """
    largest = torch.maximum(inputs.high, inputs.low.neg()).to(torch.float64)
    weight = torch.stack([each.abs().amax(0) for each in weights]).amax(0).to(torch.float64)
    used = (largest > 0) & (weight > 0)
    if not bool(used.any()):
        return torch.ones_like(largest, dtype=weights[0].dtype)
    s = largest.clamp(min=1e-30) ** alpha / weight.clamp(min=1e-30) ** (1 - alpha)
    s = (s / s[used].median()).clamp(1 / _MOST, _MOST)
    return torch.where(used, 1 / s, 1.0).to(weights[0].dtype)
