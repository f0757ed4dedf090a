"""What is chosen for a layer, and the integer layer that follows from it."""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .freeze import InputSpec, numbers_of
from .layers import QuantizedConv2d, QuantizedLayer, build
from .noise import NoiseLevel
from .patches import on_patches
from .plan import FloatLayer
from .weights import QuantizedWeight, round_to_nearest

NEAREST = "round-to-nearest"


@dataclass(frozen=True)
class Choice:
    """Everything that the integers of a layer follow from.

    `spec`: how its input becomes integers (None: it stays float). `multiplier` (in,): of its input, by smoothing.
    `weight`: the integers, by `method`; None: the weight is rounded to the nearest. `correction` (out,) float64: what
    its outputs lack on average.
    """

    spec: InputSpec | None
    multiplier: Tensor | None = None
    weight: QuantizedWeight | None = None
    correction: Tensor | None = None
    method: str = NEAREST


class Rows(Protocol):
    """Inputs to judge a choice on: `rows` (rows, in) and the noise level of each, `levels` (rows,) or None."""

    @property
    def rows(self) -> Tensor: ...

    @property
    def levels(self) -> Tensor | None: ...


def divided(module: FloatLayer, multiplier: Tensor | None) -> Tensor:
    """The float weight that goes with an input multiplied by `multiplier`."""
    weight = module.weight.detach()
    return weight if multiplier is None else weight.to(torch.float32) / multiplier.to(torch.float32)


def layer_of(module: FloatLayer, choice: Choice) -> QuantizedLayer | str:
    """The integer form of a float layer, or why it has none."""
    quantized = choice.weight or round_to_nearest(divided(module, choice.multiplier))
    if quantized is None:
        return "a channel's weights are too small for a float32 scale"
    numbers = numbers_of(quantized, module.bias, choice.spec, module.weight.dtype, choice.multiplier, choice.correction)
    return numbers if isinstance(numbers, str) else build(numbers, module)


@torch.no_grad()  # models of users have gradients: a graph would hold every tensor of a judgement
def error_of(module: FloatLayer, choice: Choice, inputs: Rows) -> float:
    """The squared error of the integer layer's output on rows, over the float one's square; infinite if it has none.

    A convolution's rows are patches of its input (patches.py).
    """
    layer = layer_of(module, choice)
    if isinstance(layer, str):
        return float("inf")
    x = inputs.rows
    if isinstance(layer, QuantizedConv2d):
        layer, x = on_patches(layer), x.view(-1, layer.in_channels, *layer.kernel_size)
        exact = F.conv2d(x, module.weight, module.bias, groups=layer.groups).to(torch.float64)
    else:
        exact = F.linear(x, module.weight, module.bias).to(torch.float64)
    layer.noise_level = NoiseLevel.of(inputs.levels)
    signal = float(exact.square().sum())
    noise = float((layer(x).to(torch.float64) - exact).square().sum())
    return noise / signal if signal else noise
