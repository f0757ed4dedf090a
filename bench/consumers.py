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

from .consumer_jobs import Row
from .consumer_proof import prove


class Runtime(NamedTuple):
    """A runtime of the table: its title with the version that is tried, and the function that returns its rows. The
    function takes a folder for files, and the directory of ComfyUI's sources, or None."""

    title: str
    rows: Callable[[Path, Path | None], Iterable[Row]]


def _comfy(folder: Path, comfyui: Path | None) -> Iterable[Row]:
    from . import comfy_maps, consumer_comfy

    assert comfyui is not None
    yield from comfy_maps.maps(folder, comfyui)
    yield from consumer_comfy.silent(folder, comfyui)
    yield from consumer_comfy.prove(folder, comfyui)


def _diffusers(name: str) -> Callable[[Path, Path | None], Iterable[Row]]:
    from .consumer_diffusers import PROOFS

    return lambda folder, _: prove(PROOFS[name], folder)


def _sglang(folder: Path, _: Path | None) -> Iterable[Row]:
    from .consumer_sglang import PROOF

    return prove(PROOF, folder)


def _vllm_omni(folder: Path, _: Path | None) -> Iterable[Row]:
    from .consumer_vllm_omni import PROOF

    return prove(PROOF, folder)


RUNTIMES = {
    "diffusers": Runtime("diffusers 0.42.1 with Octavo", _diffusers("diffusers")),
    "torchao": Runtime("diffusers 0.42.1 with torchao 0.18.0", _diffusers("torchao")),
    "sdnq": Runtime("diffusers 0.42.1 with sdnq 0.2.8", _diffusers("sdnq")),
    "comfy": Runtime("ComfyUI {} with comfy-kitchen 0.2.40", _comfy),
    "sglang": Runtime("SGLang 0.5.23", _sglang),
    "vllm-omni": Runtime("vLLM-Omni 0.30.0", _vllm_omni),
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
