"""Defines Integers: the numbers of an integer layer, such as weight codes, scales and deq, as numpy arrays, for checks
of checkpoints. Importing this module needs no torch."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from octavo.capture.arrays import Array

from ..layers.schemes import DYNAMIC, MXFP8, RANGED

if TYPE_CHECKING:
    from ..layers.modules import QuantizedLayer


class Integers(NamedTuple):
    """The numbers of one integer layer, as numpy arrays.

    | field        | meaning                                                                               |
    |--------------|---------------------------------------------------------------------------------------|
    | scheme       | W8A8, W8A8_TIMESTEP, W8A8_DYNAMIC, W8A16 or W8A8_MXFP8                                |
    | weight       | weight codes, int8 (out, in), or (out, in, height, width) for a convolution; for      |
    |              | W8A8_MXFP8 uint8, the bits of float8_e4m3fn                                           |
    | weight_scale | scale of each output channel, float32 (out,); for W8A8_MXFP8 uint8 (out, in / 32),    |
    |              | the exponents of the powers of two that blocks of inputs share, plus 127              |
    | bias         | the float bias (out,); None without one                                               |
    | input_scale  | float32 (bins,) for W8A8 and W8A8_TIMESTEP, else None                                 |
    | zero_point   | zero point of the input, int32 (bins,) for W8A8 and W8A8_TIMESTEP, else None          |
    | deq          | input scale * weight scale, float32 (bins, out) for W8A8 and W8A8_TIMESTEP, else None |
    | quant_bias   | int32 added to the sum of products, (bins, out) for W8A8 and W8A8_TIMESTEP, else None |

    `out` and `in` count channels, `bins` the timestep bins (intervals of noise levels). The arrays of a W8A8 layer,
    which has one bin, may lack the axis of bins.
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
        """Makes an object with the weight codes, scales and so on of the integer layer `layer`, copied to the CPU if
        the layer is on another device."""
        import torch

        codes, scale = layer.weight.detach().cpu(), layer.weight_scale.cpu().numpy()
        weight = (codes if layer.integer else codes.view(torch.uint8)).numpy()
        bias = None if layer.bias is None else layer.bias.detach().cpu().double().numpy()
        if layer.scheme not in RANGED:
            return cls(layer.scheme, weight, scale, bias)
        tensors = (layer.input_scale, layer.input_zero_point, layer.deq, layer.quant_bias)
        return cls(layer.scheme, weight, scale, bias, *(tensor.cpu().numpy() for tensor in tensors))

    @property
    def rows(self) -> Array:
        """The weight codes as (out, in). For a convolution, each output channel has a row of all its kernel's
        numbers: input channels x height x width."""
        return self.weight.reshape(len(self.weight), -1)

    @property
    def float_bias(self) -> Array:
        """The bias in float64 (out,); zeros for a layer without a bias."""
        return np.zeros(len(self.weight)) if self.bias is None else self.bias.astype(np.float64)

    @property
    def ranged(self) -> bool:
        """True if ranges of the layer's input are stored (W8A8, W8A8_TIMESTEP); then input_scale, zero_point, deq and
        quant_bias are not None."""
        return self.scheme in RANGED

    @property
    def dynamic(self) -> bool:
        """True if the layer computes a scale for each token when it runs (W8A8_DYNAMIC)."""
        return self.scheme == DYNAMIC

    @property
    def blocks(self) -> bool:
        """True if blocks of inputs share a power of two (W8A8_MXFP8)."""
        return self.scheme == MXFP8
