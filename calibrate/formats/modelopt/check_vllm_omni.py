"""Checks whether vLLM-Omni can load a transformer directory in the layout of ModelOpt. The rules are those in
vLLM-Omni's source."""

from collections.abc import Iterator

from ..diffusers.directory import CONFIG_FILE
from ..verdict import Verdict
from .files import AGAIN, INPUT_SCALE, LAYOUT, VLLM_NAME, WEIGHT, WEIGHT_SCALE, Files
from .models import SGLANG, UNTHREADED, VLLM_OMNI, Z_IMAGE, vllm_scale_owner
from .rules import IGNORE, ROWS_WORD, STATIC_WORD, ignored_by_vllm_omni

_UNSET = "vLLM-Omni computes with the smallest float32 number as scale, with a warning only"


def vllm_omni_verdicts(files: Files) -> Iterator[Verdict]:
    """Yields a verdict on each thing that vLLM-Omni needs in `files`: config.json, the model class, the names of
    scales, and the layers with their scales. Stops after a negative verdict on config.json or on the names."""
    fact = files.config_fault((STATIC_WORD, ROWS_WORD))
    yield Verdict(VLLM_NAME, CONFIG_FILE, not fact, fact or f"{files.algo}, which vLLM-Omni computes on CUDA")
    if fact:
        return
    if files.kind not in VLLM_OMNI:
        fact = UNTHREADED.get(files.kind, f"Octavo does not know which layers of {files.kind} vLLM-Omni holds in FP8")
        yield Verdict(VLLM_NAME, "model", files.kind not in UNTHREADED, fact)
    if key := sglang_scale(files):
        fact = f"{key} is SGLang's name of a scale, with which vLLM-Omni stops. {AGAIN} for vLLM-Omni"
        yield Verdict(VLLM_NAME, LAYOUT, False, fact)
        return
    fact = _fault(files) or ""
    sound = f"{len(files.codes)} FP8 layers with their scales" if files.codes else "no layer is FP8"
    yield Verdict(VLLM_NAME, "layers", bool(files.codes) and not fact, fact or sound)
    if not fact and files.kind in VLLM_OMNI:
        yield from _remarks(files)


def sglang_scale(files: Files) -> str | None:
    """Returns the name of the first scale that has SGLang's name of a joined layer, such as
    `attention.to_qkv.weight_scale`; None if there is none. Always None unless `files` hold a Z-Image with static FP8
    layers, the only model for which SGLang needs such names."""
    if files.kind != Z_IMAGE or files.algo != STATIC_WORD:
        return None
    joined = {SGLANG[Z_IMAGE].name(name) for name in files.layers} - set(files.layers)
    keys = (f"{name}{leaf}" for name in sorted(joined) for leaf in (WEIGHT_SCALE, INPUT_SCALE))
    return next((key for key in keys if key in files.model.tensors), None)


def _held(files: Files, name: str) -> bool:
    """Returns whether vLLM-Omni computes the layer `name` in FP8. If Octavo does not know the model class, vLLM-Omni
    counts as able to hold every layer in FP8 that the entry `ignore` does not name."""
    known = VLLM_OMNI.get(files.kind)
    return (known is None or known.holds(name)) and not ignored_by_vllm_omni(files.kind, name, files.ignore or [])


def _fault(files: Files) -> str | None:
    """Returns the first fault of a layer in words, with advice; None if there is none."""
    codes = set(files.codes)
    for name in files.layers:
        if name in codes:
            if fault := _scale_fault(files, name):
                return fault
        elif files.kind in VLLM_OMNI and _held(files, name):
            own, dtype = VLLM_OMNI[files.kind].name(name), files.stored(name + WEIGHT).dtype
            fact = f"{name} is {dtype}, and {IGNORE} lacks {own}: vLLM-Omni takes its weight for FP8 without a scale"
            return f"{fact}. Add {own} to {IGNORE}"
    if key := files.stray():
        return f"{key} has no place in vLLM-Omni, which ignores it or stops with a KeyError. {AGAIN}"
    return None


def _scale_fault(files: Files, name: str) -> str | None:
    outputs, owner = files.stored(name + WEIGHT).shape[0], vllm_scale_owner(files.kind, name)
    if not _held(files, name):  # the weight is dequantized
        if owner != name:
            fact = f"{IGNORE} makes {name} float, and vLLM-Omni takes its FP8 codes for weights, without a warning"
            return f"{fact}. {AGAIN}"
        shapes: tuple[tuple[int, ...], ...] = ((1,), (), (outputs,), (outputs, 1))
        return files.scale_fault(name + WEIGHT_SCALE, shapes, "vLLM-Omni holds the layer as float and stops")
    unset = _UNSET if owner == name else f"vLLM-Omni skips the scale under the name of diffusers. {_UNSET}"
    if files.algo == ROWS_WORD:
        return files.scale_fault(owner + WEIGHT_SCALE, ((outputs,),), unset)
    keys = (owner + WEIGHT_SCALE, owner + INPUT_SCALE)
    return next((fault for key in keys if (fault := files.scale_fault(key, ((1,), ()), unset))), None)


def _remarks(files: Files) -> Iterator[Verdict]:
    """Yields positive verdicts on what vLLM-Omni computes otherwise than the files say: FP8 layers that it keeps float,
    and joined layers whose codes it rounds again to one scale."""
    native, codes = VLLM_OMNI[files.kind], files.codes
    kept = [name for name in codes if native.holds(name) and not _held(files, name)]
    if kept:
        fact = f"{len(kept)} FP8 layers stay float, such as {kept[0]}, because an entry is part of vLLM-Omni's name"
        yield Verdict(VLLM_NAME, IGNORE, True, fact)
    if files.algo == ROWS_WORD:
        return
    for own, group in native.joined(codes).items():
        if len(group) < 2 or not _held(files, group[0]):
            continue
        if len({files.model.tensors[name + WEIGHT_SCALE].read().item() for name in group}) > 1:
            fact = f"vLLM-Omni joins layers with different scales, such as {own}, and rounds their codes again to the"
            yield Verdict(VLLM_NAME, "weight scales", True, f"{fact} largest scale")
            return
