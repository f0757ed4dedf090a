"""Prints a SHA-256 for every file that the commands write, so that two commits can be held against each other.

    python -m bench.digests > before.txt        # and at the other commit: diff before.txt after.txt

The demo is captured, then calibrated with `fast` and `balanced` in the formats ascend, diffusers and torchao; the
bundled ResNet is written as both ONNX graphs. Digests of report.json leave out `seconds` and `peak_memory`; report.html
and the manifest depend on them, and are left out. Digests are those of one machine: kernels differ between processors.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from octavo.calibrate.formats.manifest import MANIFEST

_MEASURED = ("seconds", "peak_memory")
_FORMATS = "ascend,diffusers,torchao"


def octavo(*arguments: object) -> None:
    """Runs a command of this checkout. Raises CalledProcessError where it fails."""
    subprocess.run([sys.executable, "-m", "octavo", *map(str, arguments)], check=True, stdout=sys.stderr)


def digest(file: Path) -> str:
    """The SHA-256 of a file; of a report without what is measured anew in each run."""
    content = file.read_bytes()
    if file.name == "report.json":
        report = {key: value for key, value in json.loads(content).items() if key not in _MEASURED}
        content = json.dumps(report, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()


def print_digests(directory: Path) -> None:
    """One line for each file below `directory`."""
    for file in sorted(directory.rglob("*")):
        if file.is_file() and file.suffix != ".html" and file.name != MANIFEST:
            print(digest(file), f"{directory.name}/{file.relative_to(directory)}", flush=True)


def main() -> None:
    with TemporaryDirectory() as folder:
        place = Path(folder)
        octavo("capture", "demo", place / "captured", "--limit", 8)
        for accuracy in ("fast", "balanced"):
            octavo("calibrate", place / "captured", place / accuracy, "--accuracy", accuracy, "--format", _FORMATS)
            print_digests(place / accuracy)
        graphs = ("--input-shape", "8,3,32,32", "--format", "ascend,onnx,ascend-onnx")
        octavo("calibrate", "--pipeline", "cnn", "digits", place / "digits", *graphs)
        print_digests(place / "digits")


if __name__ == "__main__":
    main()
