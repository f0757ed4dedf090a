"""Checks whether MindIE-SD can load a checkpoint. The demands were read in MindIE-SD 3.1.0 (`mindiesd.quantization`:
`quantize`, `layer`, `utils`, `config`; `utils.file_utils`):

- the description is a regular file, no link, at most 0640; its JSON has "model_quant_type", one of its algorithms;
- the weights lie beside it in quant_model_weight_{type in lower case}.safetensors, no link, at most 0640 and 100 GiB;
- a stem of the description that ends in _<digits> means a rank of a distributed run;
- a layer is quantized when its name, its .weight or its .linear.weight is described by an algorithm, and it is an
  nn.Linear; each layer by its own algorithm, whatever the type of the model;
- X.div.mul_scale multiplies the input, and the layer's tensors are X.linear.*; W8A16 layers ignore the multiplier;
- bias is read only where the layer of the float model has one;
- W8A8 adds quant_bias and no bias; W8A8_DYNAMIC and W8A16 take weight_scale in the dtype of the deployment;
- W8A8_TIMESTEP reads the keys of both. Row i is for TimestepManager.set_timestep_idx(i), where the timestep_config
  given to `quantize` says "static" for step i; without one every step is computed dynamically. The last layer's rows
  count for all;
- MindIE-SD runs in float16 or bfloat16, and the device's matmul takes int64 deq_scale for float16 only.
"""

import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from octavo.capture.errors import OctavoError

from ..verdict import Verdict
from .checkpoint import FLOATS, Checkpoint, find, rank_of, words
from .names import MUL_SCALE, file_names

_MOST_FILE, _MOST_DIRECTORY = 0o640, 0o750  # the widest modes that MindIE-SD accepts
_MOST_BYTES = 100 << 30  # bytes; the largest weight file that MindIE-SD accepts
_STATIC = ("weight", "quant_bias", "deq_scale", "input_scale", "input_offset")
_KEYS = {
    "W8A8": _STATIC,
    "W8A8_TIMESTEP": (*_STATIC, "weight_scale"),
    "W8A8_DYNAMIC": ("weight", "weight_scale"),
    "W8A16": ("weight", "weight_scale"),
}


def mindie(checkpoint: Checkpoint) -> Iterator[Verdict]:
    """Yields MindIE-SD's verdicts on names, layers and dtypes."""
    yield from _names(checkpoint)
    yield from _layers(checkpoint)
    yield from _schemes(checkpoint)
    yield from _made_biases(checkpoint)
    yield from _dtypes(checkpoint)


def check_modes(directory: Path) -> Iterator[Verdict]:
    """Yields verdicts on file modes and links: MindIE-SD refuses wide permissions and symbolic links."""
    yield _mode(directory, _MOST_DIRECTORY)
    try:
        names = find(directory)
    except (OctavoError, OSError):
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


def _names(checkpoint: Checkpoint) -> Iterator[Verdict]:
    stem = checkpoint.description_path.stem
    rank = rank_of(stem)
    yield Verdict("MindIE-SD", stem, True, f"read by rank {rank[1:]} of several" if rank else "one process")
    wanted = file_names(str(checkpoint.scheme))[0].replace(".", f"{rank}.")
    same = checkpoint.weight_path.name == wanted
    yield Verdict("MindIE-SD", checkpoint.weight_path.name, same, "found beside" if same else f"it wants {wanted}")
    size = checkpoint.weight_path.stat().st_size
    yield Verdict("MindIE-SD", "size", size <= _MOST_BYTES, f"{size} bytes in one file, of at most {_MOST_BYTES}")


def _layers(checkpoint: Checkpoint) -> Iterator[Verdict]:
    names, tensors = checkpoint.layer_names, checkpoint.tensors
    yield Verdict("MindIE-SD", "layers", bool(names), f"{len(names)} described: {_counted(checkpoint)}")
    missing = [
        checkpoint.prefix(name) + key
        for name in names
        for key in _KEYS[checkpoint.schemes[name]]
        if checkpoint.prefix(name) + key not in tensors
    ]
    yield Verdict("MindIE-SD", "keys", not missing, f"{missing[0]} is missing" if missing else "complete")
    wrong = [fact for name in names if (fact := _misfit(checkpoint, name))]
    yield Verdict("MindIE-SD", "dtypes and shapes", not wrong, wrong[0] if wrong else "as its layers take them")
    weights = [tensors.get(checkpoint.prefix(name) + "weight") for name in names]
    convolutions = [weight for weight in weights if weight and len(weight.shape) == 4]
    if convolutions:
        yield Verdict("MindIE-SD", "Conv2d", True, f"{len(convolutions)} stay float there: it quantizes linears only")


def _counted(checkpoint: Checkpoint) -> str:
    return ", ".join(f"{count} {scheme}" for scheme, count in sorted(Counter(checkpoint.schemes.values()).items()))


def _schemes(checkpoint: Checkpoint) -> Iterator[Verdict]:
    """Yields what a user of MindIE-SD has to know about the schemes in the checkpoint."""
    timed = [name for name, scheme in checkpoint.schemes.items() if scheme == "W8A8_TIMESTEP"]
    if timed:
        stored = [checkpoint.tensors.get(checkpoint.prefix(name) + "input_scale") for name in timed]
        rows = {found.shape[0] for found in stored if found and found.shape}
        fact = f"{max(rows, default=0)} rows, for set_timestep_idx(0) and on, under TimestepPolicyConfig('static')"
        same = len(rows) == 1
        yield Verdict("MindIE-SD", "timesteps", same, fact if same else "layers with different numbers of rows")
    ignored = [
        name for name, scheme in checkpoint.schemes.items()
        if scheme == "W8A16" and f"{name}.{MUL_SCALE}" in checkpoint.tensors
    ]  # fmt: skip
    if ignored:
        yield Verdict("MindIE-SD", "multipliers", False, f"it ignores that of a W8A16 layer ({ignored[0]})")


def _made_biases(checkpoint: Checkpoint) -> Iterator[Verdict]:
    dropped = [name for name in checkpoint.layer_names if checkpoint.made_bias(name)]
    if dropped:
        yield Verdict("MindIE-SD", "biases", False, f"it drops that of a layer that has none in float ({dropped[0]})")


def _misfit(checkpoint: Checkpoint, name: str) -> str | None:
    """The first tensor of a layer with a dtype or shape that MindIE-SD does not take; None where all fit."""
    tensors, prefix = checkpoint.tensors, checkpoint.prefix(name)
    weight = tensors.get(prefix + "weight")
    if weight is None:
        return None  # already reported under "keys"
    outputs, inputs = (*weight.shape, 0, 0)[:2]
    rows: tuple[int, ...] = ()
    if checkpoint.schemes[name] == "W8A8_TIMESTEP" and (first := tensors.get(prefix + "input_scale")):
        rows = first.shape[:1]
    wanted = {
        prefix + "weight": (("int8",), weight.shape),
        prefix + "bias": (FLOATS, (outputs,)),
        prefix + "quant_bias": (("int32",), (*rows, outputs)),
        prefix + "deq_scale": (("int64", "float32"), (*rows, outputs)),
        prefix + "input_scale": (FLOATS, (*rows, 1)),
        prefix + "input_offset": (FLOATS, (*rows, 1)),
        prefix + "weight_scale": (("float32",), (outputs, 1)),
        f"{name}.{MUL_SCALE}": (FLOATS, (inputs,)),
    }
    for key, (dtypes, shape) in wanted.items():
        stored = tensors.get(key)
        if stored and (stored.dtype not in dtypes or stored.shape != shape):
            return f"{key} is {words(stored)}"
    return None


def _dtypes(checkpoint: Checkpoint) -> Iterator[Verdict]:
    kinds = {stored.dtype for key, stored in checkpoint.tensors.items() if key.endswith(".deq_scale")}
    runs = "deq_scale is int64" if "int64" in kinds else "deq_scale is float32" if kinds else "no deq_scale"
    yield Verdict("MindIE-SD", "in float16", True, runs)
    fact = f"{runs}: export the model in bfloat16 for that" if "int64" in kinds else runs
    yield Verdict("MindIE-SD", "in bfloat16", "int64" not in kinds, fact)
