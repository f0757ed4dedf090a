"""The choice for one layer: how its input becomes codes, its transform, integer weight and bias correction. Makes the
integer layer from the choice."""

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
    """Everything that determines the integer form of a layer.

    `input`: how the layer's input becomes codes. `transform`: what is done to the input before it becomes codes, such
    as a division by smoothing factors; None: nothing. `weight`: the quantized weight that the rounding `method` chose;
    None: the weight is rounded to the nearest. `correction` (out,) float64: the mean of the float layer's output minus
    the mean of the integer layer's output, which is added to the bias; None: nothing is added.
    """

    input: Input
    transform: Transform | None = None
    weight: QuantizedWeight | None = None
    correction: Tensor | None = None
    method: str = NEAREST


def layer_of(module: FloatLayer, choice: Choice) -> QuantizedLayer | str:
    """Returns the integer layer that `choice` makes of the float layer `module`, or a text with the reason why it
    cannot be made."""
    weight, scheme = weight_for(choice.transform, module.weight), choice.input.weights
    quantized = choice.weight or round_to_nearest(weight, scheme=scheme)
    if quantized is None:
        return "the weights of a channel are too small for a float32 scale"
    numbers = numbers_of(quantized, module.bias, choice.input, module.weight.dtype, choice.transform, choice.correction)
    return numbers if isinstance(numbers, str) else build(numbers, module)
