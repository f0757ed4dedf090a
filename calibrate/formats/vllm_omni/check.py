"""Checks whether vLLM-Omni can load a transformer directory with its quantization methods `int8` and `mxfp8`. Also
reports faults that change the output of the model without an error from vLLM-Omni. The rules are those in vLLM-Omni's
source."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from octavo.capture.errors import OctavoError

from ...layers.schemes import MXFP8
from ..diffusers.directory import CONFIG_FILE, Model
from ..native import NativeModel
from ..verdict import Verdict
from .models import MODELS, UNTHREADED
from .rules import ACTIVATIONS, DYNAMIC_WORD, IGNORED, METHODS, Method

CONSUMER = "vLLM-Omni"
ON_ASCEND = "on Ascend"  # subject of the verdict on layers that only Ascend keeps float
_WEIGHT, _SCALE = ".weight", ".weight_scale"
_PARTS = ("weight", "weight_scale", "bias")  # the tensors of an 8-bit layer
_CODES = {method.codes for method in METHODS.values()}  # dtypes of the weights of 8-bit layers
_WIDEST = 65535  # largest number of output channels of the integer product on Ascend
_AGAIN = "Run octavo calibrate --format vllm-omni"


def check(directory: Path) -> list[Verdict]:
    """Returns the verdicts on whether vLLM-Omni can load `directory`, whose config.json has the quant_method "int8"
    or "mxfp8". Files that cannot be read give a negative verdict, not an error."""
    try:
        return list(_verdicts(Model.open(directory)))
    except OctavoError as error:
        return [Verdict(CONSUMER, "files", False, str(error))]


def layers_of(model: Model, method: Method) -> list[str]:
    """Returns the names of the 8-bit layers of `model`: those whose weight has the dtype that `method` reads."""
    weights = {name.removesuffix(_WEIGHT): tensor for name, tensor in model.tensors.items() if name.endswith(_WEIGHT)}
    return [name for name, tensor in weights.items() if tensor.stored.dtype == method.codes]


def _verdicts(model: Model) -> Iterator[Verdict]:
    method = METHODS.get(str(model.quantization.get("quant_method")))
    if method is None:
        known = " or ".join(map(repr, METHODS))
        yield Verdict(CONSUMER, CONFIG_FILE, False, f"quant_method is not {known}. {_AGAIN}")
        return
    names = layers_of(model, method)
    fact = _wrong_config(model.quantization, method, names)
    yield Verdict(CONSUMER, CONFIG_FILE, not fact, fact or "has the keys that vLLM-Omni takes, and no others")
    kind = str(model.config.get("_class_name"))
    native = MODELS.get(kind)
    if native is None:
        fact = UNTHREADED.get(kind, f"Octavo does not know which layers of {kind} vLLM-Omni can hold in 8 bits")
        yield Verdict(CONSUMER, "model", kind not in UNTHREADED, fact)
    misfits = (misfit for name in names if (misfit := _misfit(model, method, name)))
    fact = next(misfits, "") or _other_codes(model, method)
    if native is not None and not fact:
        fact = _misplaced(model, method, native, set(names)) or ""
    sound = f"{len(names)} {method.name} layers with their scales" if names else f"no layer is {method.name}"
    yield Verdict(CONSUMER, "layers", bool(names) and not fact, fact or sound)
    if method.scheme == MXFP8:
        yield Verdict(CONSUMER, MXFP8, True, "runs on Ascend 950 only")
        return
    wide = [name for name in names if model.tensors[name + _WEIGHT].stored.shape[0] > _WIDEST]
    if wide:
        fact = (
            f"{wide[0]} has more than {_WIDEST} outputs, and stays float on Ascend; its int8 weight does not fit there"
        )
        yield Verdict(CONSUMER, ON_ASCEND, False, f"{fact}. Calibrate with --keep-float {wide[0]}")


def _wrong_config(config: dict[str, Any], method: Method, names: list[str]) -> str:
    surplus = sorted(set(config) - set(method.keys))
    if surplus:
        return f"{surplus[0]} in quantization_config ends loading with a TypeError. Remove the key"
    if config.get(ACTIVATIONS, DYNAMIC_WORD) != DYNAMIC_WORD:
        return f"{ACTIVATIONS} is {config[ACTIVATIONS]!r}; vLLM-Omni accepts {DYNAMIC_WORD!r} only. {_AGAIN}"
    if names and config.get(method.serialized) is not True:
        fact = f"{method.serialized} is not true: vLLM-Omni takes the codes for float weights and quantizes them again"
        return f"{fact}, without an error. Set it to true"
    if not isinstance(config.get(IGNORED, []), list):
        return f"{IGNORED} is not a list. {_AGAIN}"
    return ""


def _other_codes(model: Model, method: Method) -> str:
    """Returns the first weight with codes that `method` does not read, in words, with advice; "" without one."""
    for key, tensor in model.tensors.items():
        dtype = tensor.stored.dtype
        if key.endswith(_WEIGHT) and dtype in _CODES and dtype != method.codes:
            return f"{key} is {dtype}, and the method {method.name} takes its codes for float weights. {_AGAIN}"
    return ""


def _misfit(model: Model, method: Method, name: str) -> str | None:
    """Returns the first fault of the 8-bit layer `name` in words, such as a missing scale, with advice; None if
    vLLM-Omni loads the layer correctly."""
    weight, scale = model.tensors[name + _WEIGHT].stored, model.tensors.get(name + _SCALE)
    if len(weight.shape) != 2:
        return f"{name}.weight has {len(weight.shape)} axes; vLLM-Omni loads linear layers only. {_AGAIN}"
    if scale is None:
        return f"{name}.weight_scale is missing: vLLM-Omni computes with a scale of unset memory. {_AGAIN}"
    outputs, inputs = weight.shape
    shape = method.scale_shape(outputs, inputs)
    if (scale.stored.dtype, scale.stored.shape) != (method.scales, shape):
        found = f"{scale.stored.dtype} {list(scale.stored.shape)}"
        return f"{name}.weight_scale is {found}, not {method.scales} {list(shape)}. {_AGAIN}"
    for key in model.tensors:
        owner, _, leaf = key.rpartition(".")
        if (owner == name and leaf not in _PARTS) or owner == f"{name}.div":
            return f"{key} has no place in vLLM-Omni, which ends loading with a KeyError or ignores it. {_AGAIN}"
    return None


def _misplaced(model: Model, method: Method, native: NativeModel, integers: set[str]) -> str | None:
    """Returns the first fault in the placement of 8-bit layers in words, with advice; None if there is none. Such a
    fault is a layer that is 8-bit in the files and float in vLLM-Omni, or the reverse. `integers` are the names of the
    8-bit layers in the files; `native` says which layers vLLM-Omni can hold in 8 bits, and which it joins."""
    codes = "integers" if method.codes == "int8" else "codes"
    ignored = {word for word in model.quantization.get(IGNORED) or [] if isinstance(word, str)}
    for name in sorted(integers):
        if not native.holds(name):
            return f"{name} is {method.name}, and vLLM-Omni takes its {codes} for float weights, or stops. {_AGAIN}"
    layers = [key.removesuffix(_WEIGHT) for key in model.tensors if key.endswith(_WEIGHT)]
    for joined, members in native.joined(layers).items():
        held = joined not in ignored and not ignored.intersection(members)
        stored = [name in integers for name in members]
        if all(stored) and not held:
            fact = f"{members[0]} is {method.name}, but {IGNORED} makes it float: {codes} become float weights"
            return f"{fact}. {_AGAIN}"
        if held and not all(stored):
            name = members[stored.index(False)]
            return f"{name} is float and not in {IGNORED}, so vLLM-Omni would cut its weights to {codes}. {_AGAIN}"
    return None
