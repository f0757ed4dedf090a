"""Defines Numbers, which holds all numbers of one 8-bit layer: weight codes, scales, zero points, bias, deq and
quant_bias."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .inputs import Input
from .transforms import Transform


@dataclass(frozen=True)
class Numbers:
    """All numbers of one 8-bit layer.

    | field        | meaning                                                                                        |
    |--------------|------------------------------------------------------------------------------------------------|
    | weight       | codes (out, in), or (out, in / groups, height, width) for a convolution                        |
    | weight_scale | float32 (out,); for MXFP8 uint8 (out, in / 32): the exponents of powers of two, plus 127       |
    | bias         | bias of the float layer; with a bias correction added if the layer has no quant_bias           |
    | input        | the way in which the input becomes codes                                                       |
    | dtype        | dtype of the float layer                                                                       |
    | transform    | applied in `dtype` to the input before it becomes codes; the weight carries the inverse        |
    | deq          | input scale * weight scale, float32 (out,), or (bins, out) for timestep bins; None for an      |
    |              | input without ranges known beforehand, and for FP8 codes                                       |
    | quant_bias   | int32 added to the sum of products: bias / deq, bias correction, and the zero point's part;    |
    |              | shaped as deq, and None if deq is                                                              |
    | made_bias    | True if the float layer has no bias, and `bias` only holds a bias correction                   |
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    input: Input
    dtype: torch.dtype
    transform: Transform | None = None
    deq: Tensor | None = None
    quant_bias: Tensor | None = None
    made_bias: bool = False

    @property
    def scheme(self) -> str:
        """The name of the scheme, such as W8A8 or W8A8_FP8_DYNAMIC (a value in `schemes.NAMES`)."""
        return self.input.name
