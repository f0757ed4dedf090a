"""Checks whether SGLang-diffusion can load a transformer directory in the layout of ModelOpt on CUDA. The rules are
those in SGLang's source."""

import json
from collections.abc import Iterator
from typing import Any

from ..diffusers.directory import CONFIG_FILE
from ..sglang.rules import DESCRIPTIONS
from ..verdict import Verdict
from .check_vllm_omni import sglang_scale
from .files import AGAIN, INPUT_SCALE, LAYOUT, SGLANG_NAME, WEIGHT, WEIGHT_SCALE, Files
from .models import SGLANG, UNTHREADED, Z_IMAGE, sglang_joined
from .rules import IGNORE, ROWS_WORD, STATIC_WORD, ignored_by_sglang

_ONES = "SGLang computes with the scale 1, with a warning only"
_METADATA = ("_quantization_metadata", "quantization_config")  # keys of the metadata that may repeat the config


def sglang_verdicts(files: Files) -> Iterator[Verdict]:
    """Yields a verdict on each thing that SGLang needs in `files`: config.json, the model class, and the layers with
    their scales. For files that only vLLM-Omni can load, yields a single negative verdict, which says so."""
    if fact := _for_vllm_omni(files):
        yield Verdict(SGLANG_NAME, LAYOUT, False, fact)
        return
    fact = files.config_fault((STATIC_WORD,)) or _other_config(files)
    yield Verdict(SGLANG_NAME, CONFIG_FILE, not fact, fact or f"{files.algo}, which SGLang computes on CUDA")
    if files.algo != STATIC_WORD or files.ignore is None:
        return
    if files.kind not in SGLANG:
        fact = UNTHREADED.get(files.kind, f"Octavo does not know which layers of {files.kind} SGLang holds in FP8")
        yield Verdict(SGLANG_NAME, "model", files.kind not in UNTHREADED, fact)
    fact = _fault(files) or ""
    sound = f"{len(files.codes)} FP8 layers with their scales" if files.codes else "no layer is FP8"
    yield Verdict(SGLANG_NAME, "layers", bool(files.codes) and not fact, fact or sound)


def _for_vllm_omni(files: Files) -> str | None:
    """Returns the reason why vLLM-Omni can load `files` and SGLang cannot; None if there is no such reason."""
    if files.algo == ROWS_WORD:
        return f"SGLang refuses {ROWS_WORD} with a ValueError. Calibrate with --activations static for SGLang"
    if files.kind == Z_IMAGE and files.algo == STATIC_WORD and not sglang_scale(files):
        fact = "SGLang joins to_q, to_k and to_v of Z-Image, and w1 and w3, and skips their scales with a warning only"
        return f"{fact}: it would put out noise. Use vLLM-Omni"
    return None


def _other_config(files: Files) -> str:
    """Returns the reason, such as a second description in the directory, why SGLang would not read the quantization
    from config.json alone; "" if there is none."""
    if described := sorted(path.name for path in files.directory.glob(DESCRIPTIONS)):
        return f"SGLang takes {described[0]} in place of the quantization_config. Move the file away"
    for key in _METADATA:
        if key in files.model.metadata and (fault := _conflict(files, files.model.metadata[key])):
            return f"{fault} in the metadata of the weights under {key}: SGLang stops with a ValueError. {AGAIN}"
    return ""


def _conflict(files: Files, text: str) -> str | None:
    try:
        content: Any = json.loads(text)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        return "there is no JSON object"
    config = files.model.quantization
    return next((f"{name} differs" for name, value in content.items() if config.get(name, value) != value), None)


def _ignored(files: Files, name: str) -> bool | None:
    return ignored_by_sglang(files.kind, name, files.ignore or [])


def _fault(files: Files) -> str | None:
    """Returns the first fault of a layer in words, with advice; None if there is none."""
    codes, native, layers = set(files.codes), SGLANG.get(files.kind), files.layers
    members = {} if native is None else sglang_joined(files.kind).joined(layers)
    groups = {name: (own, group) for own, group in members.items() for name in group}
    for name in layers:
        held, ignored = native is None or native.holds(name), _ignored(files, name)
        if held and ignored is None:
            return f"{IGNORE} has only some of the layers that SGLang joins with {name}: a ValueError. {AGAIN}"
        if name in codes:
            own, group = groups.get(name, (name, [name]))
            fault = _scale_fault(files, name, own, len(group)) if held and not ignored else _dequantized(files, name)
        else:
            fault = _crushed(files, name) if native is not None and held and not ignored else None
        if fault:
            return fault
    if key := files.stray():
        return f"SGLang skips {key}, with a warning only. {AGAIN}, which folds smoothing factors"
    return None


def _crushed(files: Files, name: str) -> str:
    own, dtype = SGLANG[files.kind].name(name), files.stored(name + WEIGHT).dtype
    fact = f"{name} is {dtype}, and {IGNORE} lacks SGLang's name {own}: SGLang casts the weight to FP8 with the scale 1"
    return f"{fact}, with a warning only. Add {own} to {IGNORE}"


def _dequantized(files: Files, name: str) -> str | None:
    """Returns a fault if the weight scale of the FP8 layer `name` is missing, although SGLang holds the layer as float
    and needs the scale to turn its codes into weights; None if the scale is there."""
    fact = "SGLang holds the layer as float and takes its codes for weights, without a warning"
    return None if name + WEIGHT_SCALE in files.model.tensors else f"{name}{WEIGHT_SCALE} is missing: {fact}. {AGAIN}"


def _scale_fault(files: Files, name: str, own: str, members: int) -> str | None:
    """Returns what is wrong with the scales of the FP8 layer `name`, with advice; None if nothing is. `own` is SGLang's
    name of the layer, and `members` the number of layers that SGLang joins under this name."""
    owner = own if members > 1 and files.kind == Z_IMAGE else name
    shapes: tuple[tuple[int, ...], ...] = ((1,), ())
    if members > 1:  # SGLang cannot concatenate tensors without an axis
        shapes = ((members,), (1,)) if owner == own else ((1,),)
    keys = (owner + WEIGHT_SCALE, owner + INPUT_SCALE)
    return next((fault for key in keys if (fault := files.scale_fault(key, shapes, _ONES))), None)
