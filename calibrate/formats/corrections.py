"""Finds out whether an integer layer has a bias correction, for the writers of formats."""

from octavo.capture.paging import page_out

from ..layers.modules import QuantizedLayer
from . import arithmetic
from .integers import Integers


def has_bias_correction(layer: QuantizedLayer) -> bool:
    """Returns whether a bias correction is part of a layer's quant_bias, the int32 number that is added to the sum of
    products, besides the bias and the zero point's effect."""
    result = arithmetic.has_bias_correction(Integers.of(layer))
    page_out(layer.weight)
    return result
