"""All numbers of one integer layer, as a value."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .inputs import SCHEMES, Activation


@dataclass(frozen=True)
class Numbers:
    """All numbers of one quantized layer; `activation` is None where only the weight is quantized.

    `weight` int8 (out, in) or (out, in / groups, height, width); `weight_scale` float32 (out,); `bias` as in the float
    layer; `mul_scale` (in,) of dtype `dtype`: the input is multiplied by it first, and the weight carries its inverse.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    activation: Activation | None
    dtype: torch.dtype  # of the float layer
    mul_scale: Tensor | None = None
    made_bias: bool = False  # the float layer has none: it carries a correction

    @property
    def scheme(self) -> str:
        """The word for it: W8A8, W8A8_TIMESTEP, W8A8_DYNAMIC or W8A16."""
        return SCHEMES[type(self.activation)]
