"""Makes diffusers know Octavo's checkpoints as soon as both are imported, in whichever order.

diffusers has no entry point for quantizers: two dicts in `diffusers.quantizers.auto` are all there is, and importing
that takes 3 s, with torch. `import octavo` must not cost that, for `octavo --help` imports octavo as well. So, where
that module is not there yet, its import is waited for: a finder steps aside as soon as it has been asked for it, and
leaves the module with the loader and spec that it has without us.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_HOME = "diffusers.quantizers.auto"
_QUANTIZER = "octavo.calibrate.formats.diffusers.quantizer"


def register_with_diffusers() -> None:
    """Enters our quantizer into diffusers' tables, now or when diffusers imports them."""
    if _HOME in sys.modules:
        enter()
    elif not any(isinstance(finder, _Awaiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Awaiting())


def enter() -> None:
    """Has our quantizer enter itself into the tables of diffusers.quantizers.auto.

    Where the quantizer was imported first, and imports diffusers, it is half there; it enters itself at its end.
    """
    import_module(_QUANTIZER)


class _Awaiting(MetaPathFinder):
    """Finds one module, once, through the finders behind it."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _HOME:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Entering(spec.loader)
        return spec


class _Entering(Loader):
    """Runs a module as its own loader does, and enters our quantizer."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        enter()
