"""Checks whether SGLang-diffusion can load a checkpoint in the layout of msModelSlim (Ascend's tool for quantization).
Also reports faults that change the output of the model without an error from SGLang. The rules are those in SGLang's
source."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from octavo.capture.arrays import read_header
from octavo.capture.errors import FileError, OctavoError, storage_error
from octavo.capture.store.headers import Stored

from ...layers.schemes import BLOCK, DYNAMIC, MXFP8, STATIC
from ..diffusers.directory import CONFIG_FILE, read_json, weight_files
from ..native import NativeModel
from ..verdict import Verdict
from .models import MODELS, REVERSED, UNTHREADED
from .rules import DESCRIPTION_FILE, DESCRIPTIONS, FLOAT, IGNORE, fits

CONSUMER = "SGLang"
_WEIGHT, _INNER, _MUL_SCALE = ".weight", ".linear", ".div.mul_scale"
_AGAIN = "Run octavo calibrate --format sglang"
_KNOWN = (STATIC, DYNAMIC, "W4A4_DYNAMIC", MXFP8, "W4A4_MXFP4", "W4A4_MXFP4_DUALSCALE")
_CODES = {STATIC: "int8", DYNAMIC: "int8", MXFP8: "float8_e4m3fn"}  # dtype of the weight
_ERRORS = {  # the tensors that an 8-bit layer needs besides its weight, with what happens without them
    DYNAMIC: {"weight_scale": "ones, with a warning only", "weight_offset": "a ValueError"},
    STATIC: {
        "weight_scale": "ones, with a warning only", "input_scale": "ones, with a warning only",
        "weight_offset": "a ValueError", "input_offset": "a ValueError", "deq_scale": "a ValueError",
        "quant_bias": "a RuntimeError",
    },
    MXFP8: {"weight_scale": "ones, which stand for 2**-126, with a warning only"},
}  # fmt: skip


class Files(NamedTuple):
    """The parts of a checkpoint that SGLang reads.

    `name` is the file name of the description, the JSON file that gives the scheme of each tensor, and `description`
    its content. `tensors` is a dict from tensor name to dtype, shape and byte offset. `kind` is the class name of the
    model in config.json; "" if there is no config.json.
    """

    name: str
    description: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    kind: str

    @property
    def schemes(self) -> dict[str, str]:
        """A dict from layer name to scheme. It has the layers whose weight is in the weight files and has a scheme in
        the description, not "FLOAT"."""
        return {
            key.removesuffix(_WEIGHT): word
            for key, word in self.description.items()
            if key.endswith(_WEIGHT) and key in self.tensors and isinstance(word, str) and word != FLOAT
        }


def read_files(directory: Path) -> Files:
    """Reads the checkpoint in `directory`: the description (the JSON file that gives the scheme of each tensor),
    config.json if there is one, and the headers of the weight files.

    Raises FileError for files that are missing or damaged.
    """
    try:
        names = sorted(path.name for path in directory.glob(DESCRIPTIONS))
        weights = sorted(directory.glob("*.safetensors"))
    except OSError as error:
        raise storage_error(directory, error) from error
    if not names or not weights:
        fact = f"no {DESCRIPTION_FILE}" if not names else "no weights"
        raise FileError(f"{directory}: {fact}. Give the directory of a checkpoint.")
    name = DESCRIPTION_FILE if DESCRIPTION_FILE in names else names[0]
    indexed = weight_files(directory)
    tensors: dict[str, Stored] = {}
    for path in indexed if len(indexed) > 1 else weights:
        tensors |= read_header(path)[0]
    config = read_json(directory / CONFIG_FILE) if (directory / CONFIG_FILE).is_file() else {}
    return Files(name, read_json(directory / name), tensors, str(config.get("_class_name", "")))


def check(directory: Path) -> list[Verdict]:
    """Returns the verdicts on whether SGLang can load the checkpoint in `directory`. Files that cannot be read give a
    negative verdict, not an error."""
    try:
        return list(_verdicts(read_files(directory)))
    except OctavoError as error:
        return [Verdict(CONSUMER, "files", False, str(error))]


def foreign(directory: Path) -> list[Verdict]:
    """Returns the verdicts on whether SGLang can load the checkpoint in `directory`, which is in format `ascend` or was
    written by msModelSlim. Returns [] if the directory has no description, the JSON file that gives the scheme of each
    tensor."""
    return check(directory) if any(directory.glob(DESCRIPTIONS)) else []


def _verdicts(files: Files) -> Iterator[Verdict]:
    schemes = files.schemes
    yield Verdict(CONSUMER, "description", True, f"{files.name}, the one that SGLang takes in this directory")
    native = MODELS.get(files.kind)
    if native is None:
        fact = UNTHREADED.get(files.kind) or (
            f"Octavo does not know which layers of {files.kind} SGLang can hold as int8"
            if files.kind
            else "no config.json: SGLang takes the model from the pipeline. Its SD3 and Sana never use integers"
        )
        yield Verdict(CONSUMER, "model", files.kind not in UNTHREADED, fact)
    yield from _tensors(files, schemes)
    if native is not None:
        fact = _misplaced(files, native, schemes) or ""
        sound = "every layer is described by the name that SGLang looks up"
        yield Verdict(CONSUMER, "names", not fact, fact or sound)
    if DYNAMIC in schemes.values():
        fact = "SGLang rounds weight_scale to bfloat16, by at most 0.2 %"
        yield Verdict(CONSUMER, "weight scales", True, fact)
    if MXFP8 in schemes.values():
        yield Verdict(CONSUMER, MXFP8, True, "runs on Ascend 950 only")


def _tensors(files: Files, schemes: Mapping[str, str]) -> Iterator[Verdict]:
    unknown = next((name for name, word in schemes.items() if word not in _KNOWN), None)
    fact = f"{len(schemes)} layers" if schemes else "no layer is quantized"
    if unknown:
        fact = f"{unknown} is {schemes[unknown]}, which SGLang does not know: a NotImplementedError. {_AGAIN}"
    yield Verdict(CONSUMER, "schemes", bool(schemes) and not unknown, fact)
    fact = _multiplied(files) or ""
    if fact:
        yield Verdict(CONSUMER, "multipliers", False, fact)
    packed = next((key for key, stored in files.tensors.items() if _packed(key, stored)), None)
    if packed:
        fact = f"{packed} is int64: SGLang runs in bfloat16 and takes the bits for a number, without an error"
        yield Verdict(CONSUMER, "dtypes", False, f"{fact}. Calibrate with --dtype bfloat16")
    faults = (fault for name, word in schemes.items() if (fault := _unfit(files, name, word)))
    if fault := next(faults, None) or _undescribed(files, schemes):
        yield Verdict(CONSUMER, "codes", False, f"{fault}. {_AGAIN}")
    missing = [
        (f"{name}.{leaf}", result)
        for name, word in schemes.items()
        for leaf, result in _ERRORS.get(word, {}).items()
        if f"{name}.{leaf}" not in files.tensors
    ]
    if missing:
        yield Verdict(CONSUMER, "keys", False, f"{missing[0][0]} is missing: {missing[0][1]}. {_AGAIN}")


def _unfit(files: Files, name: str, scheme: str) -> str | None:
    """Returns what is wrong with the dtypes and shapes of the layer `name`, described as `scheme`, in words; None if
    SGLang loads the numbers that are in the files."""
    weight, scale = files.tensors[name + _WEIGHT], files.tensors.get(f"{name}.weight_scale")
    if scheme in _CODES and weight.dtype != _CODES[scheme]:
        return f"{name} is {scheme}, but its weight is {weight.dtype}, which SGLang casts to {_CODES[scheme]} codes"
    if scheme != MXFP8 or len(weight.shape) != 2:
        return None
    outputs, inputs = weight.shape
    if not fits(inputs, scheme):
        return f"{name} has {inputs} inputs, no multiple of 64: a RuntimeError, since SGLang joins scales to pairs"
    if scale is not None and (scale.dtype, scale.shape) != ("uint8", (outputs, inputs // BLOCK)):
        found = f"{scale.dtype} {list(scale.shape)}, not uint8 {[outputs, inputs // BLOCK]}"
        return f"{name}.weight_scale is {found}: SGLang cuts scales to whole numbers, or stops"
    return None


def _undescribed(files: Files, schemes: Mapping[str, str]) -> str | None:
    for key, stored in files.tensors.items():
        if key.endswith(_WEIGHT) and stored.dtype in _CODES.values() and key.removesuffix(_WEIGHT) not in schemes:
            fact = f"{key} is {stored.dtype} and described as {files.description.get(key)!r}"
            return f"{fact}: SGLang takes its codes for bfloat16 weights"
    return None


def _packed(key: str, stored: Stored) -> bool:
    return key.endswith(".deq_scale") and stored.dtype == "int64"


def _multiplied(files: Files) -> str | None:
    for key in files.tensors:
        if key.endswith(_MUL_SCALE):
            fact = f"SGLang skips {key} and the tensors of {key.removesuffix(_MUL_SCALE)}{_INNER}, with a warning only"
            return f"{fact}. Run octavo calibrate --format sglang, which folds smoothing factors"
    return None


def _misplaced(files: Files, native: NativeModel, schemes: Mapping[str, str]) -> str | None:
    """Returns the first fault in the placement of 8-bit layers in words, with advice; None if there is none. There are
    two such faults: a layer is 8-bit in the files and SGLang holds it as float; or the description does not give, under
    SGLang's name of a layer (`native.name`), the scheme that the layer has in the files. `schemes` is a dict from layer
    name to scheme in the files."""
    listed = files.description.get(IGNORE)
    ignored = {word for word in listed if isinstance(word, str)} if isinstance(listed, list) else set()
    for key, stored in files.tensors.items():
        name = key.removesuffix(_WEIGHT)
        if not key.endswith(_WEIGHT) or len(stored.shape) != 2:
            continue
        if not native.holds(name):
            if name in schemes:
                return f"{name} is {schemes[name]}, and SGLang takes its integers for bfloat16 weights. {_AGAIN}"
            continue
        own = native.name(name)
        word = FLOAT if own in ignored else files.description.get(own + _WEIGHT)
        if word is None and name in schemes and files.kind in REVERSED:
            word = schemes[name]
        if word != schemes.get(name, FLOAT):
            fact = f'{name} is {own} in SGLang, and "{own}{_WEIGHT}" is not described as {schemes.get(name, FLOAT)}'
            return f"{fact}: a NotImplementedError. Add it to the description, or run octavo calibrate --format sglang"
    return None
