"""Tells which layers carry corrections of their output in quant_bias."""

from octavo.capture.paging import page_out

from ..layers.modules import QuantizedLayer
from . import arithmetic
from .integers import Integers


def corrected(layer: QuantizedLayer) -> bool:
    """Whether quant_bias carries more than the layer's own bias."""
    found = arithmetic.corrected(Integers.of(layer))
    page_out(layer.weight)
    return found
