"""Prints a SHA-256 for every file that the commands write, so that two commits can be compared.

    python -m bench.digests > before.txt        # and at the other commit: diff before.txt after.txt

Captures the demo and calibrates it with `fast` and `balanced` in the formats ascend, diffusers and torchao; writes the
bundled ResNet in the formats ascend, onnx and ascend-onnx. The digest of report.json ignores `seconds` and
`peak_memory`; report.html and the manifest contain these values and get no digest. Compare digests of one machine only,
because kernels differ between processors.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from octavo.calibrate.formats.manifest import MANIFEST

# keys of report.json that differ in each run
_MEASURED = ("seconds", "peak_memory")
_FORMATS = "ascend,diffusers,torchao"


def octavo(*arguments: object) -> None:
    """Runs an octavo command of this checkout. Raises CalledProcessError if it fails."""
    subprocess.run([sys.executable, "-m", "octavo", *map(str, arguments)], check=True, stdout=sys.stderr)


def digest(file: Path) -> str:
    """Computes the SHA-256 of a file; of report.json, without the entries that differ in each run."""
    content = file.read_bytes()
    if file.name == "report.json":
        report = {key: value for key, value in json.loads(content).items() if key not in _MEASURED}
        content = json.dumps(report, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()


def print_digests(directory: Path) -> None:
    """Prints a line with the digest for each file below `directory`."""
    for file in sorted(directory.rglob("*")):
        if file.is_file() and file.suffix != ".html" and file.name != MANIFEST:
            print(digest(file), f"{directory.name}/{file.relative_to(directory)}", flush=True)


def main() -> None:
    with TemporaryDirectory() as folder:
        root = Path(folder)
        octavo("capture", "demo", root / "captured", "--limit", 8)
        for accuracy in ("fast", "balanced"):
            octavo("calibrate", root / "captured", root / accuracy, "--accuracy", accuracy, "--format", _FORMATS)
            print_digests(root / accuracy)
        graphs = ("--input-shape", "8,3,32,32", "--format", "ascend,onnx,ascend-onnx")
        octavo("calibrate", "--pipeline", "cnn", "digits", root / "digits", *graphs)
        print_digests(root / "digits")


if __name__ == "__main__":
    main()
