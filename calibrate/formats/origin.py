"""Computes the fingerprint of the float model that an export is made from, for the manifest."""

from torch import nn

from octavo.capture.fingerprint import Origin

from ..layers.modules import QuantizedLayer


def origin_of(model: nn.Module) -> Origin | None:
    """Returns the fingerprint (digests of names, shapes and weights) of the float `model`, which a manifest records as
    the origin of a checkpoint. Returns None if integer layers are installed in the model, or a weight is on the meta
    device."""
    if any(isinstance(module, QuantizedLayer) for module in model.modules()):
        return None
    return Origin.of(model)
