"""From recorded calls to a checkpoint of 8-bit integers.

Reading order:

1. `layers/`: what an integer layer is
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .msmodelslim_api import Calibrator, QuantConfig
    from .runtime import accelerate

__all__ = ["Calibrator", "QuantConfig", "accelerate"]

_HOMES = {"Calibrator": "msmodelslim_api", "QuantConfig": "msmodelslim_api", "accelerate": "runtime"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
