"""Defines the `Format` object of the format `comfy`. Importing this module needs no torch."""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.capture.files import Modes

from ...attention.names import COMFY_INT8
from ...layers.schemes import DYNAMIC, FP8_STATIC
from ...layers.schemes import MXFP8 as MXFP8_DYNAMIC
from ..record import Deployment, Description, Format
from .check import COMFYUI, check, family_in
from .names import joined, kept_float, refusal
from .structure import FILE, FILES, FP8, INT8, MXFP8, Content, file_in, rotation_of

if TYPE_CHECKING:
    from torch import nn

    from ...layers.modules import QuantizedLayer


def write(
    layers: "Mapping[str, QuantizedLayer]", model: "nn.Module", directory: Path, modes: Modes, deployment: Deployment
) -> None:
    """Writes `model`, with the integer `layers` in place of its float layers, as one file in format `comfy` into
    `directory`. `modes` has the permissions of new files. Takes from `deployment` the float parameters that smoothing
    factors were folded into, and the attention modules that are quantized."""
    from .write import write_comfy

    write_comfy(layers, model, directory, modes, parameters=deployment.parameters, attention=list(deployment.attention))


def unread(model: "nn.Module", modules: Collection[str]) -> Mapping[str, str]:
    """Returns for which of the attention `modules` of `model` the attention stays float in ComfyUI, because ComfyUI
    reads no type of attention for them from the file: a dict from the name of the module to the reason."""
    from .attention import attention_tensors

    return attention_tensors(modules, model)[1]


def find(directory: Path) -> Path | None:
    """Returns `directory` if it holds a file in format `comfy`, written by Octavo or by another program; otherwise
    None."""
    return directory if directory.is_dir() and file_in(directory) else None


def describe(path: Path) -> Description:
    """Describes a file in format `comfy`: its model, the number of its layers in int8, FP8 and MXFP8, the number of its
    int8 layers for each group size of the rotation, and of its modules with quantized attention. `path` is the path of
    the file, or of the directory that holds it.

    Raises FileError for a file that is missing or damaged.
    """
    content = Content.read(file_in(path) or path / FILE)
    family, _ = family_in(content.names)
    groups = Counter(str(rotation_of(marker)) for marker in content.int8.values())
    words = {group: "not rotated" if group == "None" else f"rotated by {group}" for group in groups}
    line = ", ".join(f"{count} {words[group]}" for group, count in groups.most_common())
    title = f"{'a diffusion model' if family is None else family.title} for ComfyUI"
    counts = {kind: len(content.of(kind)) for kind in (INT8, FP8, MXFP8) if content.of(kind)} or {INT8: 0}
    facts = [f"{count} {kind}" + (f": {line}" if kind == INT8 and line else "") for kind, count in counts.items()]
    attention = [("attention", f"{len(content.attention)} modules in int8")] if content.attention else []
    return Description(title, (("layers", "; ".join(facts)), *attention), counts)


FORMATS = (
    Format(
        name="comfy",
        files="|".join(map(re.escape, FILES)),
        writer=write,
        schemes=(DYNAMIC, FP8_STATIC, MXFP8_DYNAMIC),
        whole=(FP8_STATIC,),
        transforms=("Rotate",),
        plain=(FP8_STATIC, MXFP8_DYNAMIC),
        consumer=COMFYUI,
        find=find,
        check=check,
        describe=describe,
        refusal=refusal,
        kept_float=kept_float,
        joined=joined,
        folds=True,
        made_biases=False,
        attention=(COMFY_INT8,),
        unread=unread,
    ),
)
