"""Checks whether MindIE-SD can load a checkpoint, by the rules in the source of MindIE-SD 3.1.0 (`quantize`, `layer`,
`utils` and `config` of `mindiesd.quantization`, and `utils.file_utils`):

- The description is a regular file, not a link, of mode 0640 or narrower. Its JSON has "model_quant_type", which names
  one of MindIE-SD's algorithms.
- The weight file lies beside the description and is called quant_model_weight_TYPE.safetensors, where TYPE is
  "model_quant_type" in lower case. It is not a link, has mode 0640 or narrower, and at most 100 GiB.
- A description whose stem ends in _<digits> belongs to the rank with this number in a distributed run.
- A layer is quantized if it is an nn.Linear and the description gives an algorithm for its name, NAME.weight or
  NAME.linear.weight. Each layer has its own algorithm, whatever "model_quant_type" is.
- The tensor X.div.mul_scale, if there is one, multiplies the input of layer X, and the other tensors of X are called
  X.linear.*. If X is a W8A16 layer, mul_scale is ignored.
- The bias is read only if the layer of the float model has one.
- A W8A8 layer adds quant_bias to its sum and does not use its bias. W8A8_DYNAMIC and W8A16 layers use
  weight_scale in the dtype in which the model runs.
- A W8A8_MXFP8 layer has its weight in float8_e4m3fn, or in a float dtype that is cast at each call, and weight_scale in
  uint8, (out, in / 32) rounded up. Its input becomes codes by npu_dynamic_mx_quant, which Ascend 950 has. A layer
  without a bias ends in an AttributeError when it runs.
- A W8A8_TIMESTEP layer has the tensors of W8A8 and of W8A8_DYNAMIC. TimestepManager.set_timestep_idx(i) selects row i,
  if the timestep_config given to `quantize` says "static" for step i. Without a timestep_config, every step is computed
  as in W8A8_DYNAMIC. The largest i for all layers is given by the number of rows of the layer that was loaded last.
- A module A has quantized attention if the description gives FP8_DYNAMIC or MXFP8_DYNAMIC for A.quant_type. The tensors
  A.q_rot and A.k_rot, (width, width), have to be there; query and key are multiplied by them. MindIE-SD only sets the
  attribute fa_quant of the module: the code of the model has to call it.
- MindIE-SD runs in float16 or bfloat16. If deq_scale is int64, the device's matmul works in float16 only.
"""

import os
import stat
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from octavo.capture.errors import OctavoError

from ...attention.names import ASCEND
from ...layers.schemes import BLOCK, MXFP8
from ..verdict import Verdict
from .checkpoint import FLOATS, Checkpoint, dtype_and_shape, file_names_in, rank_of
from .names import MUL_SCALE, QUANT_TYPE, ROTATIONS, file_names

if TYPE_CHECKING:
    from torch import nn

_MOST_FILE, _MOST_DIRECTORY = 0o640, 0o750  # the widest modes that MindIE-SD accepts, for files and directories
_MOST_BYTES = 100 << 30  # bytes; the largest weight file that MindIE-SD accepts
_ROUNDED = 0.02  # by how much an element of a product of two rotations may differ, which are rounded to bfloat16
_STATIC = ("weight", "quant_bias", "deq_scale", "input_scale", "input_offset")
_KEYS = {  # the tensors that MindIE-SD needs for a layer of each scheme
    "W8A8": _STATIC,
    "W8A8_TIMESTEP": (*_STATIC, "weight_scale"),
    "W8A8_DYNAMIC": ("weight", "weight_scale"),
    "W8A16": ("weight", "weight_scale"),
    MXFP8: ("weight", "weight_scale"),
}


def kept_float(model: "nn.Module", names: Collection[str], scheme: str) -> set[str]:
    """Returns the names of the layers that have to stay float because MindIE-SD cannot run them in `scheme`:
    W8A8_MXFP8 layers without a bias. They are among `names`, the layers of `model` that would become 8-bit layers."""
    return {name for name in names if scheme == MXFP8 and model.get_submodule(name).bias is None}


def mindie(checkpoint: Checkpoint) -> Iterator[Verdict]:
    """Yields verdicts on whether MindIE-SD accepts the file names, layers and dtypes of a checkpoint. Permissions are
    not checked here but in `check_modes`."""
    yield from _names(checkpoint)
    yield from _layers(checkpoint)
    yield from _schemes(checkpoint)
    yield from _made_biases(checkpoint)
    yield from _attention(checkpoint)
    yield from _dtypes(checkpoint)


def check_modes(directory: Path) -> Iterator[Verdict]:
    """Yields verdicts on the permissions of a checkpoint's directory and files: MindIE-SD refuses symbolic links, and
    permissions wider than 0750 for the directory and 0640 for files."""
    yield _mode(directory, _MOST_DIRECTORY)
    try:
        names = file_names_in(directory)
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
    fact = f"mode {mode:04o}" if ok else f"mode {mode:04o} allows more than {most:04o}. Run chmod {most:o}"
    return Verdict("MindIE-SD", path.name, ok, fact)


def _names(checkpoint: Checkpoint) -> Iterator[Verdict]:
    stem = checkpoint.description_path.stem
    rank = rank_of(stem)
    fact = f"for rank {rank[1:]} of a distributed run" if rank else "for a run of one process"
    yield Verdict("MindIE-SD", stem, True, fact)
    expected = file_names(str(checkpoint.scheme))[0].replace(".", f"{rank}.")
    same = checkpoint.weight_path.name == expected
    fact = "found beside the description" if same else f"MindIE-SD looks for {expected}. Rename the file"
    yield Verdict("MindIE-SD", checkpoint.weight_path.name, same, fact)
    size = checkpoint.weight_path.stat().st_size
    fact = f"{size} bytes of weights; MindIE-SD loads at most {_MOST_BYTES}"
    yield Verdict("MindIE-SD", "size", size <= _MOST_BYTES, fact)


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
    misfits = [fact for name in names if (fact := _misfit(checkpoint, name))]
    fact = misfits[0] if misfits else "all as MindIE-SD's layers need them"
    yield Verdict("MindIE-SD", "dtypes and shapes", not misfits, fact)
    weights = [tensors.get(checkpoint.prefix(name) + "weight") for name in names]
    convolutions = [weight for weight in weights if weight and len(weight.shape) == 4]
    if convolutions:
        fact = f"{len(convolutions)} stay float in MindIE-SD, which quantizes linears only"
        yield Verdict("MindIE-SD", "Conv2d", True, fact)


def _counted(checkpoint: Checkpoint) -> str:
    return ", ".join(f"{count} {scheme}" for scheme, count in sorted(Counter(checkpoint.schemes.values()).items()))


def _schemes(checkpoint: Checkpoint) -> Iterator[Verdict]:
    """Yields verdicts on whether MindIE-SD can run the W8A8_TIMESTEP and W8A8_MXFP8 layers of `checkpoint`, and the
    W8A16 layers that have a smoothing multiplier. Yields none if there are no such layers."""
    timed = [name for name, scheme in checkpoint.schemes.items() if scheme == "W8A8_TIMESTEP"]
    if timed:
        stored = [checkpoint.tensors.get(checkpoint.prefix(name) + "input_scale") for name in timed]
        rows = {scale.shape[0] for scale in stored if scale and scale.shape}
        fact = f"{max(rows, default=0)} rows, one for each step from set_timestep_idx(0) on; needs "
        fact += "TimestepPolicyConfig('static')"
        same = len(rows) == 1
        yield Verdict("MindIE-SD", "timesteps", same, fact if same else "the layers have different numbers of rows")
    blocks = [name for name, scheme in checkpoint.schemes.items() if scheme == MXFP8]
    if blocks:
        bare = [name for name in blocks if f"{checkpoint.prefix(name)}bias" not in checkpoint.tensors]
        fact = f"{len(blocks)} layers with a bias; they run on Ascend 950 only"
        if bare:
            fact = f"{bare[0]} has no bias: MindIE-SD ends in an AttributeError when the layer runs. Keep it float"
        yield Verdict("MindIE-SD", MXFP8, not bare, fact)
    ignored = [
        name for name, scheme in checkpoint.schemes.items()
        if scheme == "W8A16" and f"{name}.{MUL_SCALE}" in checkpoint.tensors
    ]  # fmt: skip
    if ignored:
        fact = f"MindIE-SD ignores the smoothing multiplier of a W8A16 layer ({ignored[0]})"
        yield Verdict("MindIE-SD", "multipliers", False, fact)


def _made_biases(checkpoint: Checkpoint) -> Iterator[Verdict]:
    dropped = [name for name in checkpoint.layer_names if checkpoint.made_bias(name)]
    if dropped:
        fact = f"MindIE-SD drops the bias of a layer that has none in the float model ({dropped[0]})"
        yield Verdict("MindIE-SD", "biases", False, fact)


def _attention(checkpoint: Checkpoint) -> Iterator[Verdict]:
    """Yields a verdict on the quantized attention of `checkpoint`; none if it has no such attention."""
    if not checkpoint.attention:
        return
    faults = (_attention_fault(checkpoint, module, type) for module, type in checkpoint.attention.items())
    if fault := next(filter(None, faults), None):
        yield Verdict("MindIE-SD", "attention", False, fault)
        return
    counts = Counter(checkpoint.attention.values())
    fact = ", ".join(f"{count} {type}" for type, count in sorted(counts.items()))
    fact += "; quantized where the model's code calls fa_quant of the module, which that of diffusers does not"
    yield Verdict("MindIE-SD", "attention", True, fact)


def _attention_fault(checkpoint: Checkpoint, module: str, type: str) -> str | None:
    """Returns what is wrong with the quantized attention of `module`, which the description says has this `type`; None
    if it is as MindIE-SD needs it."""
    if type not in ASCEND:
        return f"{module}.{QUANT_TYPE} is {type!r}, which MindIE-SD silently ignores"
    query, key = (checkpoint.tensors.get(f"{module}.{name}") for name in ROTATIONS)
    if query is None or key is None:
        return (
            f"{module}.{ROTATIONS[0] if query is None else ROTATIONS[1]} is missing; MindIE-SD refuses the checkpoint"
        )
    width = query.shape[-1:]
    if query.shape != width * 2 or key.shape != query.shape or not {query.dtype, key.dtype} <= set(FLOATS):
        return f"{module} has the rotations {dtype_and_shape(query)} and {dtype_and_shape(key)}"
    left, right = (checkpoint.read(f"{module}.{name}", FLOATS).astype(np.float64) for name in ROTATIONS)
    if not np.allclose(left @ right.T, np.eye(len(left)), atol=_ROUNDED):
        return f"{module} has rotations that change the scores, because {' and '.join(ROTATIONS)} are not one rotation"
    return None


def _misfit(checkpoint: Checkpoint, name: str) -> str | None:
    """Returns name, dtype and shape of the first tensor of the layer `name` that MindIE-SD does not accept; None if it
    accepts all. Ignores missing tensors."""
    tensors, prefix = checkpoint.tensors, checkpoint.prefix(name)
    weight = tensors.get(prefix + "weight")
    if weight is None:
        return None  # already reported under "keys"
    outputs, inputs = (*weight.shape, 0, 0)[:2]
    rows: tuple[int, ...] = ()
    if checkpoint.schemes[name] == "W8A8_TIMESTEP" and (first := tensors.get(prefix + "input_scale")):
        rows = first.shape[:1]
    expected: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
        prefix + "weight": (("int8",), weight.shape),
        prefix + "bias": (FLOATS, (outputs,)),
        prefix + "quant_bias": (("int32",), (*rows, outputs)),
        prefix + "deq_scale": (("int64", "float32"), (*rows, outputs)),
        prefix + "input_scale": (FLOATS, (*rows, 1)),
        prefix + "input_offset": (FLOATS, (*rows, 1)),
        prefix + "weight_scale": (("float32",), (outputs, 1)),
        f"{name}.{MUL_SCALE}": (FLOATS, (inputs,)),
    }
    if checkpoint.schemes[name] == MXFP8:
        expected[prefix + "weight"] = (("float8_e4m3fn", "bfloat16", "float16"), weight.shape)
        expected[prefix + "weight_scale"] = (("uint8",), (outputs, -(-inputs // BLOCK)))
    for key, (dtypes, shape) in expected.items():
        stored = tensors.get(key)
        if stored and (stored.dtype not in dtypes or stored.shape != shape):
            return f"{key} is {dtype_and_shape(stored)}"
    return None


def _dtypes(checkpoint: Checkpoint) -> Iterator[Verdict]:
    kinds = {stored.dtype for key, stored in checkpoint.tensors.items() if key.endswith(".deq_scale")}
    kind = "deq_scale is int64" if "int64" in kinds else "deq_scale is float32" if kinds else "no deq_scale"
    yield Verdict("MindIE-SD", "in float16", True, kind)
    fact = f"{kind}, which works in float16 only. Calibrate the model in bfloat16" if "int64" in kinds else kind
    yield Verdict("MindIE-SD", "in bfloat16", "int64" not in kinds, fact)
