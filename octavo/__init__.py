"""Octavo: diffusion pipelines from floating point to 8-bit integers.

The public names load on first use, so that importing the package stays cheap. With it imported, diffusers loads
Octavo's checkpoints: `SD3Transformer2DModel.from_pretrained(OUT)`; see `registration`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .registration import register_with_diffusers

if TYPE_CHECKING:
    from calibrate.api import Calibrator, QuantConfig
    from calibrate.runtime import accelerate
    from capture.files import SafeWriteUmask
    from capture.legacy import safe_torch_load
    from capture.listener import Listener
    from capture.reader import Capture

__version__ = "0.1.0"
__all__ = ["Calibrator", "Capture", "Listener", "QuantConfig", "SafeWriteUmask", "accelerate", "safe_torch_load"]

_HOMES = {
    "Calibrator": "calibrate.api",
    "Capture": "capture.reader",
    "Listener": "capture.listener",
    "QuantConfig": "calibrate.api",
    "accelerate": "calibrate.runtime",
    "SafeWriteUmask": "capture.files",
    "safe_torch_load": "capture.legacy",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'octavo' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


register_with_diffusers()
