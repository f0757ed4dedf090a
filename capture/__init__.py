"""Records the calls of a denoiser, and stores them in files.

Reading order:

1. `listener`: the `with` block around a run of a pipeline; `recorder` records one module for the block
2. `kept_steps`: which denoising steps are recorded; `call_arguments`: arguments by their names
3. `store/`: a directory of sealed, deduplicated units, one for each prompt: `tree`, `blobs`, `unit`, `writer`, `reader`
4. `files`, `locks`, `sealed`: every write goes through these, and survives a kill at any instant
5. `ranks`: the processes of a run that share its work
6. `pth/`: the `torch.save` lists of msModelSlim, read as data only
7. `errors`: the tree of errors that any package raises
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .files import SafeWriteUmask
    from .listener import Listener
    from .pth.pth import safe_torch_load
    from .store.reader import Capture

__all__ = ["Capture", "Listener", "SafeWriteUmask", "safe_torch_load"]

_HOMES = {"Capture": "store.reader", "Listener": "listener", "SafeWriteUmask": "files", "safe_torch_load": "pth.pth"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
