"""Searches for a transform of the input of each layer: smoothing factors, a rotation, or both.

With smoothing, input channels with large values are divided by factors, and the weight's columns multiplied by the same
factors, before input and weight are rounded.

SmoothQuant (Xiao et al., SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models,
arXiv 2211.10438, 2022): y = W x = (W * s) (x / s) with the smoothing factors s[k] = max|x[k]|**alpha / max|W[:, k]|**(1
- alpha) of the input channels k.

Of a convolution, W[:, k] are the weights of channel k at all places of the kernel; its rows are patches (patches.py).
Padding with zeros stays zero after a multiplication, so y is exact for it too. Only linear layers are rotated.

Layers that share an input share its factors. alpha is searched for each such group of layers. Ranges and factors come
from the calls that are not held out; the error of the integer layers' outputs is measured on rows of held-out calls. So
factors that only fit the calls they were computed from are not chosen. A rotation (`Rotate`) is tried without and with
the smoothing that was chosen.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..layers.inputs import Input
from ..layers.scheme import Scheme
from ..layers.transforms import Multiply, MultiplyRotate, Rotate, Transform
from ..observers.extremes import ChannelReading, Channels
from ..observers.survey import Survey
from ..plan import FloatLayer, groups_of, layer_at
from ..replay.work import Work
from .fold import FoldGroup, can_fold
from .growth import LeftOut, growth_of, left_out
from .judge import TransformJudge

ALPHAS = (0.3, 0.45, 0.6, 0.75, 0.9)  # values of alpha that are tried
_MAX_ERROR_RATIO = 0.9  # smooth only if this lowers the output error by at least 10 %: it may cost a multiplication
_NEAR = 1.07  # use the smallest alpha whose error is within 7 % of the best: it depends least on the calls
_SEPARATE = 0.8  # separate factors have to lower the error by 20 % against shared ones, which can be folded
_MOST = 2.0**12  # largest ratio between any factor and the median factor


T = TypeVar("T")


class Smoothing(NamedTuple):
    """The transform of a layer's input. Smoothing multiplies each channel by 1 / s, where s are the smoothing factors;
    `alpha` is SmoothQuant's exponent, from which s was computed, or None without smoothing. `gain`, in dB, is 10
    log10(error before / error after). This error is the sum of the relative output errors of all layers that share the
    transform, before without the transform and after with the transform. A static range of the smoothed input is
    multiplied by `growth` (`growth_of`)."""

    transform: Transform
    alpha: float | None
    gain: float
    growth: float = 1.0


class Tried(NamedTuple):
    """The transforms to try: smoothing with each of the exponents `alphas`, and rotations that mix groups of channels,
    with each of the group sizes `rotations`. `multipliers`: whether smoothing may multiply inputs at run time;
    otherwise only factors are tried that can be folded into what produces the input. `widened`: whether static ranges
    of smoothed inputs are widened (`growth_of`)."""

    alphas: tuple[float, ...] = ALPHAS
    rotations: tuple[int, ...] = ()
    multipliers: bool = True
    widened: bool = True

    @property
    def rotated(self) -> "Tried":
        """A copy of this object without the exponents: only rotations are tried."""
        return self._replace(alphas=())


SMOOTHING = Tried()  # smoothing only


class Candidate(NamedTuple):
    """Holds a transform to choose from, None for no transform, and SmoothQuant's exponent `alpha` if it smooths."""

    transform: Transform | None = None
    alpha: float | None = None


def smooth(
    model: nn.Module,
    surveys: Mapping[str, Survey],
    groups: Iterable[FoldGroup],
    kind: type[Input],
    scheme: Scheme,
    work: Work,
    tried: Tried = SMOOTHING,
) -> dict[str, Smoothing]:
    """Searches for the best of the transforms `tried` for each layer. Returns a dict from layer name to transform, with
    the layers whose output error is lowered by at least 10 %.

    `surveys` is a dict from layer name to the survey of the layer's input: channel extremes and sampled rows. `groups`
    are smoothing groups: layers that need equal factors so that these can be folded into what produces their input.
    `kind` says when ranges of inputs are found: it is a subclass of Input, such as DynamicInput. `scheme` is the rule
    that computes codes of inputs from a range, such as a symmetric one.

    Layers whose input has at most eight rows (tokens) for each sample of the batch are not smoothed, because so few
    rows do not represent other calls. Where layers of a group have different inputs, the layers of each input get
    factors of their own if that lowers the error by more than 20 %, because the large channels of one block may be
    small in another. Every rank of `work` has to call this function, because the ranks divide the groups among them.
    """
    chosen: dict[str, Smoothing] = {}
    groups = list(groups)
    foldable = {tuple(group.layers) for group in groups if can_fold(model, group)}
    groups_of_rank = work.ranks.share(list(smoothing_groups(surveys, groups)))
    for names in work.progress("smooth", groups_of_rank, len(groups_of_rank)):
        together = tried if tried.multipliers or tuple(names) in foldable else tried.rotated
        shared, error = _best_smoothing(model, names, surveys, kind, scheme, together)
        results = [shared]
        if len(parts := list(_by_input(names, surveys))) > 1:
            apart = tried if tried.multipliers else tried.rotated
            separate = [_best_smoothing(model, part, surveys, kind, scheme, apart) for part in parts]
            if sum(part_error for _, part_error in separate) < _SEPARATE * error:
                results = [smoothings for smoothings, _ in separate]
        for smoothings in results:
            chosen |= smoothings
    return {name: smoothing for part in work.ranks.gather(chosen) for name, smoothing in part.items()}


def smoothing_groups(surveys: Mapping[str, Survey], groups: Iterable[FoldGroup]) -> Iterable[list[str]]:
    """Yields lists of layer names to search smoothing factors for together: first the layers of each group in `groups`,
    then the other layers of `surveys`, in lists of layers that share an input. Layers whose input has at most eight
    rows (tokens) for each sample of the batch are left out."""
    eligible = {name for name, survey in surveys.items() if survey.has_input and survey.has_tokens}
    for group in groups:
        names = [name for name in group.layers if name in eligible]
        eligible -= set(names)
        if names:
            yield names
    yield from _by_input([name for name in surveys if name in eligible], surveys)


def _by_input(names: Iterable[str], surveys: Mapping[str, Survey]) -> Iterable[list[str]]:
    # names with the same leader share an input
    shared: dict[str, list[str]] = {}
    for name in names:
        shared.setdefault(surveys[name].leader, []).append(name)
    return shared.values()


def _best_smoothing(
    model: nn.Module,
    names: Sequence[str],
    surveys: Mapping[str, Survey],
    kind: type[Input],
    scheme: Scheme,
    tried: Tried,
) -> tuple[dict[str, Smoothing], float]:
    """Returns the transform that suits the layers `names` best, the same for all of them, as a dict from layer name to
    smoothing, and the sum of the layers' relative output errors with it. If no transform lowers this sum by at least
    10 %, the dict is empty and the sum that without a transform. `surveys` has the survey of each layer's input;
    `tried` has the transforms to try. `kind`, a subclass of Input such as DynamicInput, says when ranges of inputs are
    found; `scheme` is the rule by which inputs become codes."""
    modules = [layer_at(model, name) for name in names]
    weights = largest_of([columns_of(module) for module in modules])
    fitted, every = _merged(surveys[n].fit_channels for n in names), _merged(surveys[n].all for n in names)
    parts = [_SmoothedInput.of(model, part, surveys, kind, scheme) for part in _by_input(names, surveys)]
    final = [part.left_out(every, fit=False) if tried.widened and kind.ranged else None for part in parts]
    left = [prompts and part.left_out(fitted, fit=True) for part, prompts in zip(parts, final, strict=True)]

    def error(candidate: Candidate) -> float:
        return sum(
            part.judge.error(candidate.transform, part.growth(candidate, prompts, weights, scheme))
            for part, prompts in zip(parts, left, strict=True)
        )

    before = error(Candidate())
    smoothed = [Candidate(Multiply(multiplier_of(weights, fitted, alpha)), alpha) for alpha in tried.alphas]
    best, after = _better(Candidate(), before, smoothed, error)
    linear = all(isinstance(module, nn.Linear) for module in modules)
    best, after = _better(best, after, _rotated(best, tried.rotations if linear else (), len(weights)), error)
    best = _refitted(best, weights, every)
    if best.transform is None:
        return {}, after
    gain = 10 * float(torch.tensor(before / max(after, 1e-300)).log10())
    chosen: dict[str, Smoothing] = {}
    for part, prompts in zip(parts, final, strict=True):
        growth = part.growth(best, prompts, weights, scheme)
        chosen |= dict.fromkeys(part.names, Smoothing(best.transform, best.alpha, gain, growth))
    return chosen, after


class _SmoothedInput(NamedTuple):
    """An input of the layers `names`: its survey, the judge of its transforms, and the `energy` of each channel (in,),
    the sum of squares of the layers' weights that multiply it."""

    names: Sequence[str]
    survey: Survey
    judge: TransformJudge
    energy: Tensor

    @classmethod
    def of(
        cls, model: nn.Module, names: Sequence[str], surveys: Mapping[str, Survey], kind: type[Input], scheme: Scheme
    ) -> "_SmoothedInput":
        """Returns the input that the layers `names` of `model` share, with the first of their `surveys`."""
        modules, survey = [layer_at(model, name) for name in names], surveys[names[0]]
        squares = [columns_of(module).to(torch.float32).square().sum(0) for module in modules]
        return cls(names, survey, TransformJudge(modules, survey, kind, scheme), torch.stack(squares).sum(0))

    def left_out(self, group: Channels, *, fit: bool) -> LeftOut | None:
        """Returns the prompts to leave out, None if there are none; with `fit`, only those that are not held out.
        `group` has the extremes of all inputs that share the smoothing factors, over the same calls."""
        inputs = self.survey.fit_channels if fit else self.survey.all
        return left_out(self.survey.rows_by_prompt(fit=fit), inputs, group)

    def growth(self, candidate: Candidate, left: LeftOut | None, weights: Tensor, scheme: Scheme) -> float:
        """Returns the factor by which to multiply a static range of the input after the transform of `candidate`
        (`growth_of`); 1 unless this only smooths. `weights` has the largest |W| of each channel."""
        if left is None or candidate.alpha is None or not isinstance(candidate.transform, Multiply):
            return 1.0
        return growth_of(left, partial(multiplier_of, weights, alpha=candidate.alpha), self.energy, scheme)


def _rotated(best: Candidate, sizes: Sequence[int], channels: int) -> list[Candidate]:
    """Returns rotations that mix groups of so many of the `channels`, alone and after the smoothing `best`. Sizes that
    do not divide the number of channels are left out."""
    rotations = [Rotate.by(size) for size in sizes if not channels % size]
    alone = [Candidate(rotation) for rotation in rotations]
    if not isinstance(best.transform, Multiply):
        return alone
    return alone + [Candidate(MultiplyRotate(best.transform, rotation), best.alpha) for rotation in rotations]


def _refitted(candidate: Candidate, weights: Tensor, inputs: Channels) -> Candidate:
    """Returns `candidate` with the smoothing factors for the extremes `inputs`, those of all calls, held out or not.
    `weights` has the largest |W| of each channel."""
    if candidate.alpha is None:
        return candidate
    multiply = Multiply(multiplier_of(weights, inputs, candidate.alpha))
    if isinstance(candidate.transform, MultiplyRotate):
        return candidate._replace(transform=MultiplyRotate(multiply, candidate.transform.rotate))
    return candidate._replace(transform=multiply)


def _better(former: T, former_error: float, others: Sequence[T], error: Callable[[T], float]) -> tuple[T, float]:
    """Returns the better of a `former` transform and the transforms `others`, and its error. `error` computes the error
    of a transform. Returns the former one and `former_error` unless the least error of the others is at least 10 %
    lower. Then returns the first of the others whose error is at most 7 % above the least."""
    errors = [error(other) for other in others]
    if not errors or not min(errors) < _MAX_ERROR_RATIO * former_error:
        return former, former_error
    return next((o, e) for o, e in zip(others, errors, strict=True) if e <= _NEAR * min(errors))


def _merged(statistics: Iterable[Channels]) -> Channels:
    merged = Channels()
    for channels in statistics:
        merged.merge(channels)
    return merged


def columns_of(module: FloatLayer) -> Tensor:
    """Returns the weight of `module` with a column for each input channel, (rows, in): for a linear layer the weight
    itself; for a convolution each column has the weights that multiply the channel at any place of the kernel."""
    weight = module.weight.detach()
    if weight.ndim == 2:
        return weight
    by_group = weight.unflatten(0, (groups_of(module), -1))  # (groups, out / groups, in / groups, height, width)
    return by_group.permute(1, 3, 4, 0, 2).reshape(-1, module.in_channels)


def largest_of(weights: Sequence[Tensor]) -> Tensor:
    """Returns the largest |W| of each input channel, (in,), over several weights W (rows, in)."""
    extremes = [torch.maximum(weight.amax(0), weight.amin(0).neg()) for weight in weights]
    return torch.stack(extremes).amax(0)


def multiplier_of(weight: Tensor, inputs: Channels | ChannelReading, alpha: float) -> Tensor:
    """Returns the multiplier 1 / s (..., in) of an input, where s are the smoothing factors. The multiplier is rounded
    to the model's dtype, so that weights are divided by exactly the numbers that multiply the input.

    `weight` (in,) has the largest |W| of each input channel, as `largest_of` returns it; `inputs` has the extremes of
    each channel, (..., in). `alpha`, 0 to 1, is the exponent of the input's extremes: with 1 all channels of the input
    become equally large, with 0 all channels of the weight. The median of s is 1; s is 1 too for channels that are
    always zero or have no weights.
    """
    largest, weights = torch.maximum(inputs.high, inputs.low.neg()).to(torch.float64), weight.to(torch.float64)
    used = (largest > 0) & (weights > 0)
    s = largest.clamp(min=1e-30) ** alpha / weights.clamp(min=1e-30) ** (1 - alpha)
    median = torch.where(used, s, math.nan).nanmedian(-1, keepdim=True).values
    s = (s / median).clamp(1 / _MOST, _MOST)
    return torch.where(used, 1 / s, 1.0).to(weight.dtype)
