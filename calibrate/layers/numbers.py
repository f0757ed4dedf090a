"""All numbers of one integer layer in one object."""

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
    | weight       | int8 (out, in) or (out, in / groups, height, width)                                            |
    | weight_scale | float32 (out,)                                                                                 |
    | bias         | as in the float layer                                                                          |
    | input        | the way in which the input becomes codes                                                       |
    | dtype        | dtype of the float layer                                                                       |
    | transform    | applied in `dtype` to the input before it becomes codes; the weight carries the inverse        |
    | deq          | for an input with ranges: float32 (out,), or (bins, out); see `freeze`                         |
    | quant_bias   | for an input with ranges: int32 (out,), or (bins, out)                                         |
    | made_bias    | True if the float layer has no bias, and `bias` only holds a correction                        |
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
