"""The choice for one layer (input, transform, weight, correction), and the integer layer that follows from it."""

from dataclasses import dataclass

from torch import Tensor

from .layers.freeze import numbers_of
from .layers.inputs import Input
from .layers.modules import QuantizedLayer, build
from .layers.transforms import Transform, weight_for
from .layers.weights import QuantizedWeight, round_to_nearest
from .plan import FloatLayer

NEAREST = "round-to-nearest"


@dataclass(frozen=True)
class Choice:
    """Everything that the integers of a layer follow from.

    `input`: how the layer's input becomes codes. `transform`: applied to the input before that. `weight`: the integers,
    by `method`; None: the weight is rounded to the nearest. `correction` (out,) float64: the mean of the float output
    less that of the integers.
    """

    input: Input
    transform: Transform | None = None
    weight: QuantizedWeight | None = None
    correction: Tensor | None = None
    method: str = NEAREST


def layer_of(module: FloatLayer, choice: Choice) -> QuantizedLayer | str:
    """The integer form of a float layer, or why it has none."""
    weight, scheme = weight_for(choice.transform, module.weight), choice.input.weights
    quantized = choice.weight or round_to_nearest(weight, scheme=scheme)
    if quantized is None:
        return "a channel's weights are too small for a float32 scale"
    numbers = numbers_of(quantized, module.bias, choice.input, module.weight.dtype, choice.transform, choice.correction)
    return numbers if isinstance(numbers, str) else build(numbers, module)
