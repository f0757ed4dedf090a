"""Installs the packages of a consumer of checkpoints into a folder of its own, and runs a module of bench with them.

The packages come from PyPI with --no-deps, so that torch, diffusers and transformers stay those of Octavo's
environment. Packages for accelerators, which have no use on a CPU, are replaced by empty stand-ins (`stand_in`).
"""

import importlib.abc
import importlib.machinery
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parent.parent
CACHE = Path(os.environ.get("OCTAVO_CONSUMERS", Path.home() / ".cache" / "octavo-consumers"))
LIMIT = 900  # most seconds for a process


def installed(name: str, packages: Sequence[str], cache: Path = CACHE) -> Path:
    """Installs `packages` into the folder `name` of `cache`, unless they are there, and returns the folder."""
    folder = cache / name
    record = folder / "packages.txt"
    if not record.is_file() or record.read_text() != "\n".join(packages):
        command = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--upgrade", "--target", str(folder)]
        subprocess.run([*command, *packages], check=True)
        record.write_text("\n".join(packages))
    return folder


def run(module: str, packages: Path, *arguments: object, **variables: str) -> str:
    """Runs `python -m MODULE ARGUMENTS` with the packages in the folder `packages`, and returns what it printed.

    `variables` are more environment variables. Raises RuntimeError with the end of the output if the process fails.
    """
    environment = os.environ | {"PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT)
    if done.returncode:
        raise RuntimeError(f"{module}: {done.stderr.strip()[-2000:]}")
    return done.stdout


class _Any:
    """Stands for a class of a package that is not installed: it takes any arguments and any subscript."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __class_getitem__(cls, _: Any) -> type:
        return cls


class _StandIn(ModuleType):
    """A module in which every name exists: a class if it begins with a capital, else a function that returns None."""

    __version__ = "0.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (_Any,), {}) if name[:1].isupper() else _nothing
        setattr(self, name, value)
        return value


def _nothing(*_: Any, **__: Any) -> Any:
    """Stands for a function of a package that is not installed, also as a decorator, which then changes nothing."""
    return lambda function=None, *_, **__: function


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if any(fullname == name or fullname.startswith(f"{name}.") for name in self.names):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = _StandIn(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Does nothing: the module is empty."""


def stand_in(*names: str) -> None:
    """Makes imports of the modules `names`, and of modules in them, give empty stand-ins. Modules that ask whether a
    package is installed have to be imported before."""
    sys.meta_path.insert(0, _Finder(names))
