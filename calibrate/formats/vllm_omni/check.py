"""Checks whether vLLM-Omni can load a transformer directory with its quantization method `int8`. Also reports faults
that change the output of the model without an error from vLLM-Omni. The rules are those in vLLM-Omni's source."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from octavo.capture.errors import OctavoError

from ..diffusers.directory import CONFIG_FILE, Model
from ..native import NativeModel
from ..verdict import Verdict
from .models import MODELS, UNTHREADED
from .rules import DYNAMIC_WORD, IGNORED, KEYS, METHOD, SCHEME, SERIALIZED

CONSUMER = "vLLM-Omni"
ON_ASCEND = "on Ascend"  # subject of the verdict on layers that only Ascend keeps float
_WEIGHT, _SCALE = ".weight", ".weight_scale"
_PARTS = ("weight", "weight_scale", "bias")  # the tensors of an int8 layer
_WIDEST = 65535  # largest number of output channels of the integer product on Ascend
_AGAIN = "Run octavo calibrate --format vllm-omni"


def check(directory: Path) -> list[Verdict]:
    """Returns the verdicts on whether vLLM-Omni can load `directory`, whose config.json has the quant_method "int8".
    Files that cannot be read give a negative verdict, not an error."""
    try:
        return list(_verdicts(Model.open(directory)))
    except OctavoError as error:
        return [Verdict(CONSUMER, "files", False, str(error))]


def _verdicts(model: Model) -> Iterator[Verdict]:
    names = model.int8_layers
    fact = _wrong_config(model.quantization, names)
    yield Verdict(CONSUMER, CONFIG_FILE, not fact, fact or "has the keys that vLLM-Omni takes, and no others")
    kind = str(model.config.get("_class_name"))
    native = MODELS.get(kind)
    if native is None:
        fact = UNTHREADED.get(kind, f"Octavo does not know which layers of {kind} vLLM-Omni can hold as int8")
        yield Verdict(CONSUMER, "model", kind not in UNTHREADED, fact)
    misfits = (misfit for name in names if (misfit := _misfit(model, name)))
    fact = next(misfits, "")
    if native is not None and not fact:
        fact = _misplaced(model, native, set(names)) or ""
    sound = f"{len(names)} int8 layers with their scales" if names else "no layer is int8"
    yield Verdict(CONSUMER, "layers", bool(names) and not fact, fact or sound)
    wide = [name for name in names if model.tensors[name + _WEIGHT].stored.shape[0] > _WIDEST]
    if wide:
        fact = (
            f"{wide[0]} has more than {_WIDEST} outputs, and stays float on Ascend; its int8 weight does not fit there"
        )
        yield Verdict(CONSUMER, ON_ASCEND, False, f"{fact}. Calibrate with --keep-float {wide[0]}")


def _wrong_config(config: dict[str, Any], names: list[str]) -> str:
    surplus = sorted(set(config) - set(KEYS))
    if surplus:
        return f"{surplus[0]} in quantization_config ends loading with a TypeError. Remove the key"
    if config.get(SCHEME, DYNAMIC_WORD) != DYNAMIC_WORD:
        return f"{SCHEME} is {config[SCHEME]!r}; vLLM-Omni accepts {DYNAMIC_WORD!r} only. {_AGAIN}"
    if names and config.get(SERIALIZED) is not True:
        fact = f"{SERIALIZED} is not true: vLLM-Omni takes the integers for float weights and quantizes them again"
        return f"{fact}, without an error. Set it to true"
    if not isinstance(config.get(IGNORED, []), list):
        return f"{IGNORED} is not a list. {_AGAIN}"
    return "" if config.get("quant_method") == METHOD else f"quant_method is not {METHOD!r}. {_AGAIN}"


def _misfit(model: Model, name: str) -> str | None:
    """Returns the first fault of the int8 layer `name` in words, such as a missing scale, with advice; None if
    vLLM-Omni loads the layer correctly."""
    weight, scale = model.tensors[name + _WEIGHT].stored, model.tensors.get(name + _SCALE)
    if len(weight.shape) != 2:
        return f"{name}.weight has {len(weight.shape)} axes; vLLM-Omni loads linear layers only. {_AGAIN}"
    if scale is None:
        return f"{name}.weight_scale is missing: vLLM-Omni computes with a scale of unset memory. {_AGAIN}"
    if (scale.stored.dtype, scale.stored.shape) != ("float32", (weight.shape[0], 1)):
        found = f"{scale.stored.dtype} {list(scale.stored.shape)}"
        return f"{name}.weight_scale is {found}, not float32 [{weight.shape[0]}, 1]. {_AGAIN}"
    for key in model.tensors:
        owner, _, leaf = key.rpartition(".")
        if (owner == name and leaf not in _PARTS) or owner == f"{name}.div":
            return f"{key} has no place in vLLM-Omni, which ends loading with a KeyError or ignores it. {_AGAIN}"
    return None


def _misplaced(model: Model, native: NativeModel, integers: set[str]) -> str | None:
    """Returns the first fault in the placement of int8 layers in words, with advice; None if there is none. Such a
    fault is a layer that is int8 in the files and float in vLLM-Omni, or the reverse. `integers` are the names of the
    int8 layers in the files; `native` says which layers vLLM-Omni can hold as int8, and which it joins."""
    ignored = {word for word in model.quantization.get(IGNORED) or [] if isinstance(word, str)}
    for name in sorted(integers):
        if not native.holds(name):
            return f"{name} is int8, and vLLM-Omni takes its integers for float weights, or stops. {_AGAIN}"
    layers = [key.removesuffix(_WEIGHT) for key in model.tensors if key.endswith(_WEIGHT)]
    for joined, members in native.joined(layers).items():
        held = joined not in ignored and not ignored.intersection(members)
        stored = [name in integers for name in members]
        if all(stored) and not held:
            return f"{members[0]} is int8, but {IGNORED} makes it float: integers become float weights. {_AGAIN}"
        if held and not all(stored):
            name = members[stored.index(False)]
            return f"{name} is float and not in {IGNORED}, so vLLM-Omni would cut its weights to integers. {_AGAIN}"
    return None
