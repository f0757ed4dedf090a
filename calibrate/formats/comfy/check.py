"""Checks whether ComfyUI computes with the int8, FP8 and MXFP8 weights of a file correctly, and whether SGLang and
stable-diffusion.cpp can load the file. The file may come from Octavo or from another program.

ComfyUI itself reports only some faults. A fault that it ignores has a negative verdict here too. For example, ComfyUI
uses the codes of an int8 weight as float weights if the layer has no marker, the JSON object that says how the layer is
quantized.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import numpy as np

from octavo.capture.arrays import read_array
from octavo.capture.errors import OctavoError

from ...attention.names import COMFY_INT8
from ..verdict import Verdict
from . import float_checks
from .families import FAMILIES
from .family import Family
from .structure import ATTENTION, FP8, FULL_PRECISION, INT8, METADATA, MXFP8, Content, Marker, file_in, rotation_of

COMFYUI, SGLANG, CPP = "ComfyUI", "SGLang", "stable-diffusion.cpp"
_FORMATS = (INT8, FP8, "float8_e5m2", "nvfp4", MXFP8, "convrot_w4a4")  # those that ComfyUI 0.28 knows
# keys of an int8 marker that ComfyUI reads, and "per_row", which only repeats the shape of the scale
_KEYS = {"format", "convrot", "convrot_groupsize", "params", FULL_PRECISION, "num_experts", "per_row"}
# keys of a marker in FP8 or MXFP8 that ComfyUI reads, and those that only repeat shapes and dtypes
_FLOAT_KEYS = {"format", FULL_PRECISION, "num_experts", "group_size", "orig_dtype", "orig_shape"}
_WORDS = {INT8: "int8", FP8: "FP8", MXFP8: "MXFP8"}  # kinds of layers in words
# tensors beside an int8 weight that other programs write, and that ComfyUI drops
_DROPPED = ("pre_quant_scale", "input_scale", "input_offset", "smooth_factor", "mul_scale", "weight_zero_point")
_SGLANG_GROUPS, _SGLANG_MODEL = (16, 64, 256), "Qwen-Image-2.1"  # and MiniMax-H3, which Octavo does not know
_AGAIN = "Calibrate again with --format comfy, or ask the maker of the file for another."


def check(path: Path) -> list[Verdict]:
    """Returns the verdicts on a file in format `comfy`. `path` is the path of the file, or of the directory that holds
    it. A file that cannot be read gives a negative verdict, not an error."""
    file = file_in(path)
    if file is None:
        return [Verdict(COMFYUI, "files", False, f"{path}: holds no file with markers of ComfyUI. {_AGAIN}")]
    try:
        content = Content.read(file)
        return [*_for_comfyui(content), _for_sglang(content), _for_cpp(content)]
    except OctavoError as error:
        return [Verdict(COMFYUI, "files", False, str(error))]


def _for_comfyui(content: Content) -> Iterator[Verdict]:
    """Yields the verdicts for ComfyUI: one for each check in _CHECKS, which covers markers, scales, rotations and more,
    and one on the names of the tensors. If the file has no layers in int8, FP8 or MXFP8, yields one more, a negative
    verdict."""
    counts = Counter(_WORDS[kind] for marker in content.effective.values() if (kind := marker.get("format")) in _WORDS)
    count = " and ".join(f"{number} {word} layers" for word, number in counts.items()) or "no layers"
    if not counts and not content.integer_weights:
        yield Verdict(COMFYUI, "layers", False, f"has no int8 layers, nor any in FP8 or MXFP8. {_AGAIN}")
    for subject, find, fact in _CHECKS:
        faults = list(find(content))
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        yield Verdict(
            COMFYUI, subject, not faults, f"{faults[0]}{more}. {_AGAIN}" if faults else fact.format(count=count)
        )
    yield from _attention(content)
    yield _names(content)


def _attention(content: Content) -> Iterator[Verdict]:
    """Yields a verdict on the quantized attention of a file; none if it has no such attention."""
    configs = content.attention
    for name, config in configs.items():
        if config is None or config.get("attention") != COMFY_INT8:
            fact = "is not a JSON object" if config is None else f"asks for {config.get('attention')!r}"
            yield Verdict(
                COMFYUI, "attention", False, f"{name}.{ATTENTION} {fact}, which ComfyUI does not take. {_AGAIN}"
            )
            return
    if configs:
        fact = f"{len(configs)} modules in int8, from ComfyUI 0.38 on and where comfy-kitchen has the kernel"
        yield Verdict(COMFYUI, "attention", True, fact)


def _markers(content: Content) -> Iterator[str]:
    """Yields the faults of markers in words. A marker is the JSON object that says how a layer is quantized. There are
    two kinds of faults. One is a marker that cannot be read, has an unknown format, or belongs to no weight or to a
    weight of another dtype. The other is an int8 weight that has no marker or does not have two axes."""
    yield from content.faults
    markers = content.effective
    for name in content.integer_weights:
        if name not in markers:
            yield f"{name}.weight is int8 without a marker; ComfyUI silently takes the integers for weights"
        elif len(content.tensors[f"{name}.weight"].shape) != 2:
            yield f"{name}.weight is int8 and no matrix; ComfyUI silently takes the integers for weights"
    for name, marker in markers.items():
        if f"{name}.weight" not in content.tensors:
            yield f"{name} has a marker, but no weight"
        elif marker.get("format") not in _FORMATS:
            yield f"{name} has the format {marker.get('format')!r}, which ComfyUI does not know"
    for name in content.int8:
        weight = content.tensors.get(f"{name}.weight")
        if weight is not None and weight.dtype != "int8":
            yield f"{name}.weight is {weight.dtype}, not int8; ComfyUI silently cuts it to whole numbers"
    yield from float_checks.markers(content)


def _agreement(content: Content) -> Iterator[str]:
    """Yields a fault for each layer whose marker in the layer's tensor differs in format or rotation from its marker in
    the metadata of the file. ComfyUI obeys the marker in the metadata."""
    for name, marker in (content.metadata or {}).items():
        other = content.markers.get(name)
        if other is None or (marker.get("format") == other.get("format") and rotation_of(marker) == rotation_of(other)):
            continue
        told = f"{_text(marker)} in {METADATA}, which ComfyUI silently takes, but {_text(other)} in its marker"
        yield f"{name} is {told}"


def _text(marker: Marker) -> str:
    group = rotation_of(marker)
    return f"{marker.get('format')} {'not rotated' if group is None else f'rotated by {group}'}"


def _scales(content: Content) -> Iterator[str]:
    """Yields the faults of weight scales in words: a scale that is missing, has a dtype or shape that ComfyUI cannot
    use, or has a number that is not positive and finite."""
    for name in content.int8:
        weight, scale = (content.tensors.get(f"{name}.{leaf}") for leaf in ("weight", "weight_scale"))
        if weight is None or len(weight.shape) != 2:
            continue
        rows = weight.shape[0]
        if scale is None:
            yield f"{name}.weight_scale is missing; ComfyUI refuses the file"
        elif scale.dtype != "float32":
            yield f"{name}.weight_scale is {scale.dtype}, not float32; kernels fail or round it"
        elif scale.shape not in ((rows, 1), (rows,), (1,), ()):
            yield f"{name}.weight_scale has shape {list(scale.shape)}, not {[rows, 1]}"
        else:
            values = read_array(content.path, scale)
            if not (np.isfinite(values) & (values > 0)).all():
                yield f"{name}.weight_scale has a number that is not positive and finite"
    yield from float_checks.scales(content)


def _rotations(content: Content) -> Iterator[str]:
    """Yields the faults of rotations in words: a group size that is no power of four or does not divide the number of
    inputs, and a marker that gives a group size but does not switch the rotation on."""
    for name, marker in content.int8.items():
        group, weight = rotation_of(marker), content.tensors.get(f"{name}.weight")
        if group is None:
            if "convrot_groupsize" in marker:
                yield f"{name} has convrot_groupsize without convrot; ComfyUI silently does not rotate"
        elif not _is_power_of_four(group):
            yield f"{name} is rotated by {group!r}, not by a power of four"
        elif weight is not None and weight.shape[-1:] and weight.shape[-1] % group:
            yield f"{name} has {weight.shape[-1]} inputs, not a multiple of the {group} that are rotated"


def _is_power_of_four(group: object) -> bool:
    return type(group) is int and group >= 4 and group & (group - 1) == 0 and group.bit_length() % 2 == 1


def _dropped(content: Content) -> Iterator[str]:
    """Yields a fault for each tensor that ComfyUI does not read although the output of an 8-bit layer depends on it,
    such as the layer's smoothing multiplier."""
    for name in dict.fromkeys([*content.int8, *content.integer_weights]):
        for leaf in _DROPPED:
            if f"{name}.{leaf}" in content.tensors:
                yield f"{name}.{leaf} is silently dropped by ComfyUI, so the output is wrong"
    yield from float_checks.dropped(content)


def _keys(content: Content) -> Iterator[str]:
    """Yields a fault for each key that ComfyUI does not read in the marker (JSON description) of a layer. In a marker
    of an FP8 or MXFP8 layer, the keys of a rotation are such keys too."""
    for name, marker in content.effective.items():
        if marker.get("format") not in _WORDS:
            continue
        known = _KEYS if marker["format"] == INT8 else _FLOAT_KEYS
        for key in sorted(set(map(str, marker)) - known):
            yield f"{name} has the key {key!r} in its marker, which ComfyUI silently passes over"


_CHECKS: tuple[tuple[str, Callable[[Content], Iterator[str]], str], ...] = (
    ("markers", _markers, "{count}, each with a marker"),
    ("metadata", _agreement, "agree with the markers"),
    ("scales", _scales, "positive, of dtypes and shapes that ComfyUI reads"),
    ("order of scales", float_checks.order, "nothing shows that scales of blocks are in another order than ComfyUI's"),
    ("input scales", float_checks.inputs, "every FP8 layer with rounded inputs has one"),
    ("codes", float_checks.codes, "no code is NaN"),
    ("rotations", _rotations, "groups of a power of four divide the inputs"),
    ("left out", _dropped, "no tensors that ComfyUI would drop"),
    ("keys", _keys, "no keys that ComfyUI would pass over"),
)


def family_in(names: Collection[str]) -> tuple[Family | None, bool]:
    """Returns the `Family` of a model, a table of the native names of its tensors. `names` are the tensor names in a
    file. The second result is True if they are native names, False if they are names of diffusers. Returns (None, True)
    if `names` fit no `Family`."""
    for family in FAMILIES.values():
        if family.diffusers in names:
            return family, False
    return next((family for family in FAMILIES.values() if family.native in names), None), True


def _names(content: Content) -> Verdict:
    """Returns the verdict on whether the tensors have the native names that ComfyUI reads. The verdict is negative if
    they have the names of diffusers. Names of a model that Octavo does not know are not checked, and give a positive
    verdict."""
    family, native = family_in(content.names)
    if family is None:
        return Verdict(COMFYUI, "names", True, "not those of a model that Octavo knows, so they were not checked")
    if native:
        return Verdict(COMFYUI, "names", True, f"native names of {family.title}")
    fact = f"{family.title} with the names of diffusers: ComfyUI refuses them, or silently drops scales and markers"
    return Verdict(COMFYUI, "names", False, f"{fact}. {_AGAIN}")


def _for_sglang(content: Content) -> Verdict:
    """Returns the verdict on whether SGLang loads the file. SGLang needs every int8 layer to be rotated, in groups of
    16, 64 or 256 channels, and loads only Qwen-Image-2.1 among the models that Octavo knows."""
    family, _ = family_in(content.names)
    if kinds := {word for kind, word in _WORDS.items() if kind != INT8 and content.of(kind)}:
        words, title = " and ".join(sorted(kinds)), "this model" if family is None else family.title
        fact = f"loads {words} files of ComfyUI for MiniMax-H3 only; Octavo does not know whether it loads {title}"
        return Verdict(SGLANG, "model", False, fact)
    for name, marker in content.int8.items():
        group, weight = rotation_of(marker), content.tensors.get(f"{name}.weight")
        scale = content.tensors.get(f"{name}.weight_scale")
        if group not in _SGLANG_GROUPS:
            return Verdict(SGLANG, "layers", False, f"{name} is not rotated by 16, 64 or 256, as SGLang needs it")
        if weight is None or scale is None or scale.shape not in ((*weight.shape[:1], 1), ()):
            return Verdict(SGLANG, "layers", False, f"{name}.weight_scale does not have the shape [rows, 1] or []")
    if family is not None and family.title != _SGLANG_MODEL:
        fact = f"loads the int8 files of MiniMax-H3 and {_SGLANG_MODEL}, not those of {family.title}"
        return Verdict(SGLANG, "model", False, fact)
    return Verdict(SGLANG, "layers", True, "all int8 layers are rotated by 16, 64 or 256")


def _for_cpp(content: Content) -> Verdict:
    """Returns the verdict on whether stable-diffusion.cpp loads the file. The verdict is negative if an int8 layer has
    no tensor `comfy_quant`, from which stable-diffusion.cpp reads the layer's marker, and if there are layers in FP8 or
    MXFP8, which its documentation does not list."""
    if word := next((word for kind, word in _WORDS.items() if kind != INT8 and content.of(kind)), None):
        return Verdict(CPP, "layers", False, f"its documentation does not list {word} files of ComfyUI")
    for name in content.integer_weights:
        if name not in content.markers:
            return Verdict(CPP, "layers", False, f"{name} has no tensor comfy_quant, which stable-diffusion.cpp reads")
    plain = sum(rotation_of(marker) is None for marker in content.int8.values())
    if plain:
        return Verdict(CPP, "layers", True, f"{plain} int8 layers are not rotated, which its documentation leaves open")
    return Verdict(CPP, "layers", True, "all int8 layers are rotated, as its documentation describes")
