"""Who can load a checkpoint, line by line, and why not.

What MindIE-SD demands was read in its 3.1.0 (`mindiesd.quantization.quantize`, `layer`, `utils.file_utils`):

- the description is a regular file, no link, at most 0640; its JSON has "model_quant_type", one of its algorithms;
- the weights lie beside it in quant_model_weight_{type in lower case}.safetensors, no link, at most 0640 and 100 GiB;
- a stem of the description that ends in _<digits> means a rank of a distributed run;
- a layer is taken when its name, its .weight or its .linear.weight is described by an algorithm, and is an nn.Linear;
- W8A8 reads weight, quant_bias, deq_scale, input_scale, input_offset, and bias of a layer with bias; W8A16 reads
  weight, weight_scale and bias;
- it runs in float16 or bfloat16, and the device's matmul takes int64 deq_scale for float16 only.
"""

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from capture.errors import CaptureError

from ..load import Checkpoint, find
from .arithmetic import worst_share
from .ascend import file_names

_MOST_FILE, _MOST_DIRECTORY = 0o640, 0o750
_MOST_BYTES = 100 << 30
_RANK = re.compile(r"_\d+$")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Verdict(NamedTuple):
    """One line: a consumer, what it looks at, whether that is as it needs it, and the fact."""

    consumer: str
    subject: str
    ok: bool
    fact: str


def check(directory: Path | str) -> list[Verdict]:
    """The verdicts on a checkpoint. A file that cannot be read is a verdict too; nothing is raised for it."""
    directory = Path(directory)
    try:
        checkpoint = Checkpoint(directory)
    except CaptureError as error:
        return [Verdict("octavo", "files", False, str(error)), *_modes(directory)]
    return [
        *_octavo(checkpoint),
        *_modes(directory),
        *_mindie_names(checkpoint),
        *_mindie_layers(checkpoint),
        Verdict("diffusers", "config.json", False, "this version writes no view that diffusers loads"),
    ]


def _octavo(checkpoint: Checkpoint) -> Iterator[Verdict]:
    names = checkpoint.layer_names
    try:
        shares = {name: worst_share(checkpoint.layer(name)) for name in names}
        yield Verdict("octavo", "numbers", True, f"{len(names)} layers within bounds")
        worst = max(shares, key=shares.__getitem__, default="")
        share = shares.get(worst, 0.0)
        fact = f"as npu_quant_matmul computes them, off by at most {share:.2f} of what rounding explains"
        yield Verdict("octavo", "integers", share <= 1.0, fact if share <= 1.0 else f"{fact} ({worst})")
    except CaptureError as error:
        yield Verdict("octavo", "numbers", False, str(error))
    described = set(checkpoint.description) - {"model_quant_type"}
    lost, bare = sorted(described - set(checkpoint.tensors)), sorted(set(checkpoint.tensors) - described)
    fact = f"{len(described)} described, all there"
    if lost or bare:
        fact = f"{(lost or bare)[0]} is {'described and missing' if lost else 'not described'}"
    yield Verdict("octavo", "description", not (lost or bare), fact)


def _modes(directory: Path) -> Iterator[Verdict]:
    """MindIE-SD refuses wide permissions and links."""
    yield _mode(directory, _MOST_DIRECTORY)
    try:
        names = find(directory)
    except (CaptureError, OSError):
        return
    for name in names:
        if os.path.lexists(directory / name):
            yield _mode(directory / name, _MOST_FILE)


def _mode(path: Path, most: int) -> Verdict:
    try:
        status = path.lstat()
    except OSError as error:
        return Verdict("MindIE-SD", path.name, False, (error.strerror or str(error)).lower())
    if stat.S_ISLNK(status.st_mode):
        return Verdict("MindIE-SD", path.name, False, "is a symbolic link")
    mode = stat.S_IMODE(status.st_mode) & 0o777
    ok = mode & ~most == 0
    return Verdict("MindIE-SD", path.name, ok, f"mode {mode:04o}" + ("" if ok else f" is above {most:04o}"))


def _mindie_names(checkpoint: Checkpoint) -> Iterator[Verdict]:
    stem = checkpoint.description_path.stem
    ranked = bool(_RANK.search(stem))
    yield Verdict("MindIE-SD", stem, not ranked, "is read as one of several ranks" if ranked else "one process")
    wanted = file_names(str(checkpoint.scheme))[0]
    same = checkpoint.weight_path.name == wanted
    yield Verdict("MindIE-SD", checkpoint.weight_path.name, same, "found beside" if same else f"it wants {wanted}")
    size = checkpoint.weight_path.stat().st_size
    yield Verdict("MindIE-SD", "size", size <= _MOST_BYTES, f"{size} bytes in one file, of at most {_MOST_BYTES}")


def _mindie_layers(checkpoint: Checkpoint) -> Iterator[Verdict]:
    keys = {
        "W8A8": ("weight", "quant_bias", "deq_scale", "input_scale", "input_offset"),
        "W8A16": ("weight", "weight_scale"),
    }
    names, tensors = checkpoint.layer_names, checkpoint.tensors
    yield Verdict("MindIE-SD", "layers", bool(names), f"{len(names)} described as {checkpoint.scheme}")
    missing = [
        f"{name}.{key}"
        for name in names
        for key in keys[checkpoint.description[f"{name}.weight"]]
        if f"{name}.{key}" not in tensors
    ]
    yield Verdict("MindIE-SD", "keys", not missing, f"{missing[0]} is missing" if missing else "complete")
    wrong = [fact for name in names if (fact := _misfit(checkpoint, name))]
    yield Verdict("MindIE-SD", "dtypes and shapes", not wrong, wrong[0] if wrong else "as its layers take them")
    convolutions = [name for name in names if f"{name}.weight" in tensors and len(tensors[f"{name}.weight"].shape) == 4]
    if convolutions:
        yield Verdict("MindIE-SD", "Conv2d", True, f"{len(convolutions)} stay float there: it quantizes linears only")
    yield from _mindie_dtype(checkpoint)


def _misfit(checkpoint: Checkpoint, name: str) -> str | None:
    """What about the tensors of a layer does not fit, if anything."""
    tensors = checkpoint.tensors
    weight = tensors.get(f"{name}.weight")
    if weight is None:
        return None  # said already
    outputs = weight.shape[0] if weight.shape else 0
    wanted = {
        "weight": ((torch.int8,), weight.shape),
        "bias": (_FLOATS, (outputs,)),
        "quant_bias": ((torch.int32,), (outputs,)),
        "deq_scale": ((torch.int64, torch.float32), (outputs,)),
        "input_scale": (_FLOATS, (1,)),
        "input_offset": (_FLOATS, (1,)),
        "weight_scale": ((torch.float32,), (outputs, 1)),
    }
    for key, (dtypes, shape) in wanted.items():
        stored = tensors.get(f"{name}.{key}")
        if stored and (stored.dtype not in dtypes or stored.shape != shape):
            return f"{name}.{key} is {str(stored.dtype).removeprefix('torch.')} {list(stored.shape)}"
    return None


def _mindie_dtype(checkpoint: Checkpoint) -> Iterator[Verdict]:
    kinds = {stored.dtype for key, stored in checkpoint.tensors.items() if key.endswith(".deq_scale")}
    runs = "deq_scale is int64" if torch.int64 in kinds else "deq_scale is float32" if kinds else "no deq_scale"
    yield Verdict("MindIE-SD", "in float16", True, runs)
    fact = f"{runs}: export the model in bfloat16 for that" if torch.int64 in kinds else runs
    yield Verdict("MindIE-SD", "in bfloat16", torch.int64 not in kinds, fact)
