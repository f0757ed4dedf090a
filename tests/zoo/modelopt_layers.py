"""FP8 layers as the format modelopt holds them, built directly."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from octavo.calibrate.layers.freeze import numbers_of
from octavo.calibrate.layers.inputs import RULES, DynamicInput, Input, StaticInput
from octavo.calibrate.layers.modules import QuantizedLayer, build
from octavo.calibrate.layers.scheme import QParams
from octavo.calibrate.layers.weights import round_to_nearest

INPUT_SCALE = 4.0 / 448.0


def fp8_layer(
    module: nn.Module, scheme: str, input_scale: float = INPUT_SCALE, *, per_tensor: bool = True
) -> QuantizedLayer:
    """Returns the FP8 layer of this `scheme` for a float layer. A static layer has one weight scale, or with
    `per_tensor=False` one for each output channel."""
    static = scheme == "W8A8_FP8"
    rule = replace(RULES[scheme], per_tensor=static and per_tensor)
    qparams = QParams(torch.tensor(input_scale), torch.tensor(0, dtype=torch.int32))
    input: Input = StaticInput(qparams, scheme=rule) if static else DynamicInput(scheme=rule)
    weight = module.weight
    assert isinstance(weight, Tensor)
    rounded = round_to_nearest(weight, scheme=input.weights)
    assert rounded is not None
    bias = module.bias if isinstance(module.bias, Tensor) else None
    numbers = numbers_of(rounded, bias, input, weight.dtype)
    assert not isinstance(numbers, str)
    return build(numbers, module)
