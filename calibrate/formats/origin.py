"""Tells which float model an export is made of, for its manifest."""

from torch import nn

from octavo.capture.fingerprint import Origin

from ..layers.modules import QuantizedLayer


def origin_of(model: nn.Module) -> Origin | None:
    """The origin of files made of the float `model`; None for a model that has integer layers installed."""
    if any(isinstance(module, QuantizedLayer) for module in model.modules()):
        return None
    return Origin.of(model)
