"""Measures loading and one call of a stored model in a process of its own: seconds, and MiB above the start."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from torch import nn

from octavo.calibrate.resources import peak_memory


def memory_of(model: nn.Module, kwargs: dict) -> dict[str, float]:
    """Seconds to load `model` from a file (`load`), MiB of the file (`file`), and the peak of the process in MiB, whole
    (`raw`) and above the libraries (`peak`)."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "model.pt"
        torch.save((model, kwargs), file)
        command = [sys.executable, "-m", "bench.runtime_memory", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return {"file": file.stat().st_size / 2**20, **json.loads(done.stdout)}


def main(file: str) -> None:
    from diffusers import SD3Transformer2DModel  # noqa: F401  (the memory of libraries is not the model's)

    import octavo.calibrate.runtime  # noqa: F401

    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    model, kwargs = torch.load(file, weights_only=False, mmap=True)
    seconds = time.perf_counter() - start
    with torch.inference_mode():
        model(**kwargs)
    print(json.dumps({"load": seconds, "raw": peak_memory() / 2**20, "peak": (peak_memory() - before) / 2**20}))


if __name__ == "__main__":
    main(sys.argv[1])
