"""What is chosen for a layer, and the integer layer that follows from it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .layers.freeze import numbers_of
from .layers.inputs import InputSpec
from .layers.modules import QuantizedLayer, build
from .layers.weights import QuantizedWeight, round_to_nearest
from .plan import FloatLayer

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
