"""Compiles the C kernels in calibrate/native/ when Octavo is installed from source or its wheel is built, on
Linux with an x86-64 processor.

Every kernel is compiled once for each target, a set of vector instructions, into one library. When Octavo runs,
kernels.py chooses a target that the processor has. Targets that the compiler does not know are left out. Without a
compiler Octavo is installed without the library, and the installation prints a warning.
"""

import hashlib
import os
import platform
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCES, LIBRARY = "octavo/calibrate/native", "octavo/calibrate/native/libkernels.so"
FLAGS = "-O3 -fno-math-errno -fopenmp -fPIC"
_AVX2 = "-mavx2 -mfma -mf16c"
_AVX512 = f"{_AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni"
TARGETS = {
    "avx2": _AVX2,
    "avx_vnni": f"{_AVX2} -mavxvnni",
    "avx512_vnni": _AVX512,
    "avx512_bf16": f"{_AVX512} -mavx512bf16",
}


class Kernels(BuildHookInterface):
    """Compiles the C library of the kernels, puts it beside the folder of its sources, and adds it to the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles the library before a wheel or an editable installation is made, and adds it to the files in
        `build_data`. hatchling calls this method. `version` is "standard" for a wheel, "editable" for an editable
        installation, and makes no difference."""
        if not (sys.platform == "linux" and platform.machine() == "x86_64"):
            return
        library, sources = Path(self.root, LIBRARY), Path(self.root, SOURCES)
        try:
            missing = [] if _is_compiled(sources, library) else compile_to(sources, library)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or str(error)
            self.app.display_warning(f"{SOURCES}: not compiled, so models run more slowly on this CPU. {reason}")
            return
        if missing:
            self.app.display_warning(f"{SOURCES}: the compiler does not know the targets {', '.join(missing)}.")
        build_data["artifacts"].append(LIBRARY)
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


def _is_compiled(sources: Path, library: Path) -> bool:
    """Returns whether `library` was compiled from the C files in the folder `sources` as they are now, and is newer
    than hatch_build.py."""
    if not library.exists() or library.stat().st_mtime < Path(__file__).stat().st_mtime:
        return False
    return digest(sources).encode() in library.read_bytes()


def compile_to(sources: Path, library: Path) -> list[str]:
    """Compiles the C files of the folder `sources` to the shared library `library`. Returns the names of the targets
    (sets of vector instructions) that the compiler does not know.

    Raises CalledProcessError if the compiler reports an error, OSError if the compiler cannot be started, for example
    because there is none. In both cases an older `library` stays as it was.
    """
    compiler = shlex.split(os.environ.get("CC", "cc"))
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(os.cpu_count()) as pool:
        folder = Path(name)
        known = list(pool.map(lambda target: _knows(compiler, TARGETS[target]), TARGETS))
        targets = [target for target, is_known in zip(TARGETS, known, strict=True) if is_known]
        objects = list(pool.map(lambda command: _object(command, folder), _commands(compiler, sources, targets)))
        made = library.with_name(f"{library.name}.{os.getpid()}")  # git ignores it, so it gets into no wheel
        try:
            _run([*compiler, *FLAGS.split(), "-shared", *objects, "-lm", "-o", str(made)])
            made.replace(library)  # processes that run keep the one they have
        finally:
            made.unlink(missing_ok=True)
    return [target for target in TARGETS if target not in targets]


def _knows(compiler: list[str], flags: str) -> bool:
    command = [*compiler, *flags.split(), "-E", "-x", "c", os.devnull, "-o", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def _commands(compiler: list[str], sources: Path, targets: list[str]) -> Iterator[list[str]]:
    """Yields the commands that compile the sources, without the name of the output: one command for targets.c, and for
    each other source one command for each of `targets`, names of sets of vector instructions."""
    for source in sorted(sources.glob("*.c")):
        if source.name == "targets.c":
            yield [*compiler, *FLAGS.split(), f'-DSOURCE="{digest(sources)}"', "-c", str(source)]
            continue
        for target in targets:
            yield [*compiler, *FLAGS.split(), *TARGETS[target].split(), f"-DTARGET={target}", "-c", str(source)]


def _object(command: list[str], folder: Path) -> str:
    """Runs `command`, which compiles one source file, with a new object file in `folder` as its output. Returns the
    path of the object file."""
    handle, name = tempfile.mkstemp(".o", dir=folder)
    os.close(handle)
    _run([*command, "-o", name])
    return name


def digest(folder: Path) -> str:
    """Returns the SHA-256 digest of the C files in `folder`. The function kernels.digest computes the same, but cannot
    be imported before Octavo is installed."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.[ch]")):
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
