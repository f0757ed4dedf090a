"""Records the calls of a denoiser and stores them on disk.

Reading order:

1. `listener`: a `with` block around a run of a pipeline; `recorder`: the hooks that record one module in that block
2. `kept_steps`: chooses the denoising steps to record; `call_arguments`: finds the name of each argument
3. `store/`: the directory of a capture, with one unit for each prompt: `tree`, `blobs`, `unit`, `writer`, `reader`
4. `files`, `locks`, `sealed`: crash-safe writing and checked reading; every write uses these modules
5. `ranks`: the processes that share the work of one run
6. `pth/`: the `torch.save` lists of msModelSlim, loaded without running code from the file
7. `errors`: the errors that all packages raise
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .files import SafeWriteUmask
    from .listener import Listener
    from .pth.pth import safe_torch_load
    from .store.reader import Capture

__all__ = ["Capture", "Listener", "SafeWriteUmask", "safe_torch_load"]

# the module that defines each public name
_HOMES = {"Capture": "store.reader", "Listener": "listener", "SafeWriteUmask": "files", "safe_torch_load": "pth.pth"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
