"""The numbers of one integer layer as numpy arrays, to be checked. Importing this module needs no torch."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from octavo.capture.arrays import Array

from ..layers.schemes import DYNAMIC, RANGED

if TYPE_CHECKING:
    from ..layers.modules import QuantizedLayer


class Integers(NamedTuple):
    """The numbers of one integer layer.

    | field        | meaning                                                                                        |
    |--------------|------------------------------------------------------------------------------------------------|
    | scheme       | W8A8, W8A8_TIMESTEP, W8A8_DYNAMIC or W8A16                                                     |
    | weight       | int8 (out, ...)                                                                                |
    | weight_scale | float32 (out,)                                                                                 |
    | bias         | (out,), or None                                                                                |
    | input_scale  | for a scheme with ranges: float32 (bins,)                                                      |
    | zero_point   | for a scheme with ranges: int32 (bins,)                                                        |
    | deq          | for a scheme with ranges: float32 (bins, out)                                                  |
    | quant_bias   | for a scheme with ranges: int32 (bins, out)                                                    |

    A W8A8 layer may lack the axis of bins.
    """

    scheme: str
    weight: Array
    weight_scale: Array
    bias: Array | None = None
    input_scale: Array | None = None
    zero_point: Array | None = None
    deq: Array | None = None
    quant_bias: Array | None = None

    @classmethod
    def of(cls, layer: "QuantizedLayer") -> "Integers":
        """The numbers of a layer."""
        weight, scale = layer.weight.detach().cpu().numpy(), layer.weight_scale.cpu().numpy()
        bias = None if layer.bias is None else layer.bias.detach().cpu().double().numpy()
        if layer.scheme not in RANGED:
            return cls(layer.scheme, weight, scale, bias)
        tensors = (layer.input_scale, layer.input_zero_point, layer.deq, layer.quant_bias)
        return cls(layer.scheme, weight, scale, bias, *(tensor.cpu().numpy() for tensor in tensors))

    @property
    def rows(self) -> Array:
        """The weight as int8 (out, in)."""
        return self.weight.reshape(len(self.weight), -1)

    @property
    def added(self) -> Array:
        """The bias in float64; zeros without one."""
        return np.zeros(len(self.weight)) if self.bias is None else self.bias.astype(np.float64)

    @property
    def ranged(self) -> bool:
        """Whether the ranges of inputs are known beforehand: then input_scale, zero_point, deq and quant_bias exist."""
        return self.scheme in RANGED

    @property
    def dynamic(self) -> bool:
        """Whether each token has a scale of its own."""
        return self.scheme == DYNAMIC
