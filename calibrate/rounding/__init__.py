"""Weights to integers by what the layer's output loses, not by what the weights do.

Every method is a function of the weight (out, in) or (out, in, height, width) and of second-order statistics of the
layer's input (`Inputs`; None: it is not known). It gives int8 codes within 127 and a float32 scale for each channel, or
None where rounding to the nearest does. No channel's `error` is above that of rounding to the nearest, and the same
arguments give the same bits.
"""

from collections.abc import Callable

from ..weights import QuantizedWeight, round_to_nearest
from .adaround import adaround
from .admm import admm
from .easy_quant import activation_scale, easy_quant, easy_quant_pair
from .gptq import gptq
from .objective import Inputs, error, inputs_of

__all__ = [
    "WEIGHT_METHODS",
    "Inputs",
    "activation_scale",
    "adaround",
    "admm",
    "easy_quant",
    "easy_quant_pair",
    "error",
    "gptq",
    "inputs_of",
]

# (weight, inputs, *, iterations=..., seed=0)
WEIGHT_METHODS: dict[str, Callable[..., QuantizedWeight | None]] = {
    "round-to-nearest": round_to_nearest,
    "easy-quant": easy_quant,
    "admm": admm,
    "adaround": adaround,
    "gptq": gptq,
}
