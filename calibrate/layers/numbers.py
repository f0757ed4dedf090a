"""Defines Numbers, which holds all numbers of one integer layer: weight codes, scales, zero points, bias, deq and
quant_bias."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .inputs import WORDS, Input
from .transforms import Transform


@dataclass(frozen=True)
class Numbers:
    """All numbers of one integer layer.

    | field        | meaning                                                                                        |
    |--------------|------------------------------------------------------------------------------------------------|
    | weight       | int8 codes (out, in), or (out, in / groups, height, width) for a convolution                   |
    | weight_scale | float32 (out,)                                                                                 |
    | bias         | bias of the float layer; with a bias correction added if the layer has no quant_bias           |
    | input        | the way in which the input becomes codes                                                       |
    | dtype        | dtype of the float layer                                                                       |
    | transform    | applied in `dtype` to the input before it becomes codes; the weight carries the inverse        |
    | deq          | input scale * weight scale, float32 (out,), or (bins, out) for timestep bins; None for an      |
    |              | input without ranges known beforehand                                                          |
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
        """The name of the scheme: W8A8, W8A8_TIMESTEP, W8A8_DYNAMIC or W8A16."""
        return WORDS[type(self.input)]
