"""Lets the runtimes' own code load and compute checkpoints that Octavo writes, and prints a table of what was proven.

    python -m bench.consumers [NAME...] [--comfyui DIR] [--folder DIR]

The names are those of RUNTIMES; without a name all of them run, one after another, each in an environment of its own
(bench/consumer_environment.py). The proof of ComfyUI needs a directory with ComfyUI's sources. The exit code is 1 if a
row of the table is not ok. `how proven` says what the runtime did: "computed" its layers or the whole model, "loaded"
the files, or "read", which compares names only.
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from . import (
    comfy_maps,
    consumer_comfy,
    consumer_comfy_fp8,
    consumer_modelopt_sglang,
    consumer_modelopt_vllm_omni,
    consumer_sglang,
    consumer_vllm_omni,
)
from .consumer_diffusers import DIFFUSERS, PROOFS
from .consumer_jobs import Proof, Row
from .consumer_packages import SGLANG, VLLM_OMNI
from .consumer_proof import prove


class Runtime(NamedTuple):
    """A runtime of the table: its title with the version that is tried, and the function that returns its rows. The
    function takes a folder for files, and the directory of ComfyUI's sources, or None."""

    title: str
    rows: Callable[[Path, Path | None], Iterable[Row]]


def _comfy(folder: Path, comfyui: Path | None) -> Iterable[Row]:
    assert comfyui is not None
    yield from comfy_maps.maps(folder, comfyui)
    yield from consumer_comfy.silent(folder, comfyui)
    yield from consumer_comfy.prove(folder, comfyui)
    yield from consumer_comfy.attention(folder, comfyui)
    yield from consumer_comfy_fp8.silent(folder, comfyui)
    yield from consumer_comfy_fp8.prove(folder, comfyui)


def _proven(proof: Proof) -> Callable[[Path, Path | None], Iterable[Row]]:
    return lambda folder, _: prove(proof, folder)


def _pinned(package: str, packages: Iterable[str]) -> str:
    """Returns the version of `package` that the list `packages` asks for."""
    return next(entry.removeprefix(f"{package}==") for entry in packages if entry.startswith(f"{package}=="))


_WITH = f"diffusers {_pinned('diffusers', [DIFFUSERS])} with"
RUNTIMES = {
    "diffusers": Runtime(f"{_WITH} Octavo", _proven(PROOFS["diffusers"])),
    "torchao": Runtime(f"{_WITH} torchao {_pinned('torchao', PROOFS['torchao'].packages)}", _proven(PROOFS["torchao"])),
    "sdnq": Runtime(f"{_WITH} sdnq {_pinned('sdnq', PROOFS['sdnq'].packages)}", _proven(PROOFS["sdnq"])),
    "comfy": Runtime(f"ComfyUI {{}} with comfy-kitchen {_pinned('comfy-kitchen', comfy_maps.PACKAGES)}", _comfy),
    "sglang": Runtime(f"SGLang {_pinned('sglang', SGLANG)}", _proven(consumer_sglang.PROOF)),
    "vllm-omni": Runtime(f"vLLM-Omni {_pinned('vllm-omni', VLLM_OMNI)}", _proven(consumer_vllm_omni.PROOF)),
    "sglang-fp8": Runtime(f"SGLang {_pinned('sglang', SGLANG)} in FP8", _proven(consumer_modelopt_sglang.PROOF)),
    "vllm-omni-fp8": Runtime(
        f"vLLM-Omni {_pinned('vllm-omni', VLLM_OMNI)} in FP8", _proven(consumer_modelopt_vllm_omni.PROOF)
    ),
}


def _version(comfyui: Path) -> str:
    """Returns the version of the ComfyUI in the directory `comfyui`."""
    match = re.search(r'__version__ = "(.*)"', (comfyui / "comfyui_version.py").read_text())
    return match[1] if match else "of unknown version"


def table(names: Iterable[str], comfyui: Path | None, folder: Path) -> bool:
    """Prints the table for the runtimes `names`, and returns whether all rows are ok."""
    sound, version = True, "" if comfyui is None else _version(comfyui)
    print("| runtime | family | how proven | ok | fact |\n|---|---|---|---|---|", flush=True)
    for name in names:
        title, rows = RUNTIMES[name].title.format(version), RUNTIMES[name].rows
        try:
            for row in rows(folder, comfyui):
                sound &= row.ok
                word = "yes" if row.ok else "NO"
                print(f"| {title} | {row.family} | {row.how} | {word} | {row.fact} |", flush=True)
        except Exception as error:  # the other runtimes are independent of this one
            sound = False
            fact = " ".join(f"{type(error).__name__} {error}".split())
            print(f"| {title} | all | did not run | NO | {fact[:300]} |", flush=True)
    return sound


def main() -> None:
    """Runs the proofs that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m bench.consumers")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"a runtime: {', '.join(RUNTIMES)}; all without one")
    parser.add_argument("--comfyui", type=Path, metavar="DIR", help="directory with the sources of ComfyUI")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="keep the files here")
    options = parser.parse_args()
    if unknown := set(options.names) - set(RUNTIMES):
        parser.error(f"{unknown.pop()} is not a runtime. Choose from {', '.join(RUNTIMES)}.")
    names = options.names or list(RUNTIMES)
    if "comfy" in names and options.comfyui is None:
        print("comfy is skipped: it needs --comfyui DIR, a directory with the sources of ComfyUI.\n", file=sys.stderr)
        names = [name for name in names if name != "comfy"]
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(0 if table(names, options.comfyui, options.folder or Path(temporary)) else 1)


if __name__ == "__main__":
    main()
