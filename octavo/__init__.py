"""Octavo quantizes diffusion pipelines from floating point to 8-bit integers.

The public names load on first use, so that importing the package stays cheap. After `import octavo`, diffusers loads
the checkpoints that Octavo writes in the format `diffusers`, as in
`SD3Transformer2DModel.from_pretrained("checkpoint")`; see `diffusers_registration`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .diffusers_registration import register_with_diffusers

if TYPE_CHECKING:
    from octavo.calibrate import Calibrator, QuantConfig, accelerate
    from octavo.capture import Capture, Listener, SafeWriteUmask, safe_torch_load

__version__ = "0.1.0"
__all__ = ["Calibrator", "Capture", "Listener", "QuantConfig", "SafeWriteUmask", "accelerate", "safe_torch_load"]

_PACKAGES = {  # public name: the package below octavo that defines it
    "Calibrator": "calibrate",
    "Capture": "capture",
    "Listener": "capture",
    "QuantConfig": "calibrate",
    "accelerate": "calibrate",
    "SafeWriteUmask": "capture",
    "safe_torch_load": "capture",
}


def __getattr__(name: str) -> Any:
    if name not in _PACKAGES:
        raise AttributeError(f"module 'octavo' has no attribute {name!r}")
    return getattr(import_module(f".{_PACKAGES[name]}", __name__), name)


register_with_diffusers()
