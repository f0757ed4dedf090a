"""Finds out whether an integer layer has a bias correction, for the writers of formats."""

from octavo.capture.paging import page_out

from ..layers.modules import QuantizedLayer
from . import arithmetic
from .integers import Integers


def has_bias_correction(layer: QuantizedLayer) -> bool:
    """Returns whether a layer's quant_bias, the int32 numbers that are added to the sums of products, contain a bias
    correction. Without one they contain only the float bias and the effect of the zero point. Returns False for a layer
    that has no quant_bias."""
    if not (layer.calibrated and layer.integer):
        return False
    result = arithmetic.has_bias_correction(Integers.of(layer))
    page_out(layer.weight)
    return result
