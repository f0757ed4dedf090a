"""Measures the output error of layers whose input goes through a transform, on rows of held-out calls."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers.inputs import Codes, Input, StaticInput, weights_for
from ..layers.products import codes_up_to, integer_convolution, integer_matmul
from ..layers.scheme import QParams, Range, Scheme, codes, qparams_of
from ..layers.transforms import Transform, transformed, transformed_patches, weight_for
from ..layers.weights import scales_of, spread
from ..observers.survey import Survey
from ..plan import FloatLayer, groups_of


class TransformJudge:
    """Measures how well a transform suits the layers `modules`, which share one input: by the squared error of each
    layer's output on rows of held-out calls, divided by the sum of squares of its float output. `survey` has these
    rows, for convolutions patches. `kind` is the way in which the input becomes codes, such as StaticInput, and
    `scheme` the rule for these codes.

    Outputs are computed as the integer layers compute them, up to the rounding of scales.
    """

    def __init__(self, modules: Sequence[FloatLayer], survey: Survey, kind: type[Input], scheme: Scheme) -> None:
        self._modules, self._survey, self._kind, self._scheme = modules, survey, kind, scheme
        self._rows = survey.judge_sample.rows
        rows = self._rows.to(torch.float32)
        self._exact = [_linear(rows, module.weight.detach().to(torch.float32), groups_of(module)) for module in modules]
        self._signals = [
            _energy(y if module.bias is None else y + module.bias.detach())
            for module, y in zip(modules, self._exact, strict=True)
        ]

    def error(self, transform: Transform | None, growth: float = 1.0) -> float:
        """Returns the sum of the layers' relative squared errors when their input goes through `transform` and a static
        range of the result is multiplied by `growth`; infinite if a layer has no integer form then."""
        x = self._codes(transform, growth)
        if x is None:
            return math.inf
        total = 0.0
        for module, exact, signal in zip(self._modules, self._exact, self._signals, strict=True):
            weight = weight_for(transform, module.weight)
            product = _product(x, weight, weights_for(self._scheme), groups_of(module))
            if product is None:
                return math.inf
            noise = _energy(product.sub_(exact))
            total += noise / signal if signal else noise
        return total

    def _codes(self, transform: Transform | None, growth: float) -> Codes | None:
        x = transformed_patches(transform, self._rows, self._survey.taps).to(torch.float32)
        if not self._kind.ranged:
            peaks = self._survey.judge_peaks
            if peaks is None:
                return self._kind(scheme=self._scheme).codes(x)
            largest = transformed(transform, peaks).to(torch.float32).amax(1, keepdim=True)
            return Codes(*codes_up_to(x, largest, weights_for(self._scheme)), None)
        if transform is None or transform.by_channel:
            extent = self._survey.fit_channels.range(transform).times(growth)
        else:  # the extremes of channels do not give those of mixed channels: sampled rows have to do
            extent = Range(*map(float, transformed(transform, self._survey.fit_sample.rows).aminmax()))
        qparams = qparams_of(extent, self._scheme, self._modules[0].weight.dtype)
        return None if qparams is None else StaticInput(qparams, scheme=self._scheme).codes(x)


def _product(x: Codes, weight: Tensor, scheme: Scheme, groups: int) -> Tensor | None:
    """Returns the product (rows, out) of an input and a float `weight` after both became codes, in float32 and without
    the bias. `x` holds the codes of the input; `scheme` is the rule by which the weight becomes codes; `groups` is the
    number of groups of a convolution, 1 for a linear layer. Returns None if a channel of the weight is too small for a
    float32 scale."""
    scale = scales_of(weight, scheme)
    if scale is None:
        return None
    q = codes(weight, QParams(scale, torch.zeros_like(scale)), scheme)
    if not scheme.element.integer:
        return _linear(x.q * x.scale, q.mul_(spread(scale, q)), groups)
    q = q.to(scheme.element.dtype)
    if groups == 1:
        total = integer_matmul(x.q.to(scheme.element.dtype), q.flatten(1))
    else:
        total = integer_convolution(_kernels(x.q, q, groups), q, (1, 1), (1, 1), groups).flatten(1)
    if x.zero_point is not None:
        total -= x.zero_point * q.flatten(1).sum(1, dtype=torch.int32)
    return total.to(torch.float32) * (x.scale * scale)


def _linear(rows: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Returns the product (rows, out) of `rows` and a float `weight`. For a convolution with `groups` groups, the rows
    are patches of its input."""
    if groups == 1:
        return F.linear(rows, weight.flatten(1))
    return F.conv2d(_kernels(rows, weight, groups), weight, groups=groups).flatten(1)


def _kernels(rows: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Returns the `rows`, each a patch of a convolution's input, as small images: (rows, in, height, width), with the
    height and width of the kernel in `weight`. `groups` is the number of groups of the convolution."""
    return rows.view(len(rows), groups * weight.shape[1], *weight.shape[2:])


def _energy(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2
