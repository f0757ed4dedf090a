"""Measures the seconds of loading a stored model, and the memory of loading it and running one call, in a process."""

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
    """Measures loading `model` from a file and running one call, in another process.

    Returns seconds to load (`load`), MiB of the file (`file`), and the peak memory of the process in MiB, as it is
    (`raw`) and minus the memory of the imported libraries (`peak`).
    """
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "model.pt"
        torch.save((model, kwargs), file)
        command = [sys.executable, "-m", "bench.runtime_memory", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return {"file": file.stat().st_size / 2**20, **json.loads(done.stdout)}


def main(file: str) -> None:
    from diffusers import SD3Transformer2DModel  # noqa: F401  (imported first, so that its memory does not count)

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
