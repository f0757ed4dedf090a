"""Registers Octavo's quantizer with diffusers as soon as both are imported, in either order.

diffusers has no entry point for quantizers, only two dicts in `diffusers.quantizers.auto`. Importing that module takes
3 s, because it imports torch, and `octavo --help` must not wait for it. So, if the module is not imported yet,
`import octavo` adds a finder to `sys.meta_path`. When diffusers imports the module, the finder removes itself and
registers the quantizer after the import. The module keeps the loader and spec that it would have without Octavo.
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
    """Registers Octavo's quantizer in the dicts of the module `diffusers.quantizers.auto`. Does so at once if diffusers
    has imported that module, otherwise as soon as the module is imported."""
    if _HOME in sys.modules:
        enter()
    elif not any(isinstance(finder, _ImportFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _ImportFinder())


def enter() -> None:
    """Imports Octavo's quantizer, whose last lines register it in the dicts of `diffusers.quantizers.auto`.

    The quantizer imports diffusers, whose import calls this function again. That inner call does nothing; the quantizer
    registers itself when its own import ends.
    """
    import_module(_QUANTIZER)


class _ImportFinder(MetaPathFinder):
    """A finder in `sys.meta_path` that waits for the import of `diffusers.quantizers.auto`. Then it removes itself,
    lets the other finders find the module, and makes the module's loader register Octavo's quantizer."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _HOME:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(Loader):
    """Loads a module with its own `loader`, then registers Octavo's quantizer."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        enter()
