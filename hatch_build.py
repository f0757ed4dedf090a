"""Compiles calibrate/runtime/kernels.c where Octavo is installed or its wheel is built, on Linux with an x86-64.

Without a compiler that can, Octavo is installed without it, and says so.
"""

import hashlib
import os
import platform
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE, LIBRARY = "octavo/calibrate/runtime/kernels.c", "libkernels.so"
FLAGS = "-O3 -fno-math-errno -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -mfma -fopenmp -shared -fPIC"


class Kernels(BuildHookInterface):
    """Puts the library beside its source, and into the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Before the wheel is made; of an editable installation too."""
        source = Path(self.root, SOURCE)
        if not (sys.platform == "linux" and platform.machine() == "x86_64"):
            return
        try:
            compile_to(source, source.with_name(LIBRARY))
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or str(error)
            self.app.display_warning(f"{SOURCE}: not compiled, so integers run more slowly on this CPU. {reason}")
            return
        build_data["artifacts"].append(str(Path(SOURCE).with_name(LIBRARY)))
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


def compile_to(source: Path, library: Path) -> None:
    """Raises OSError or CalledProcessError, and leaves `library` as it was, where it cannot be made."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder, library.name)
        command = [*compiler, *FLAGS.split(), f'-DSOURCE="{digest}"', str(source), "-lm", "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        made.replace(library)  # processes that run keep the one they have
