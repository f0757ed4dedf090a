"""Defines the `Format` object of the format `ascend`. Importing this module needs no torch."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.capture.files import Modes

from ...attention.names import ASCEND
from ...layers.schemes import DYNAMIC, MXFP8, STATIC, TIMESTEP, WEIGHT_ONLY
from ..record import Deployment, Description, Format, Readable
from .check import check
from .checkpoint import Checkpoint
from .mindie import kept_float
from .names import DESCRIPTION_FILE

if TYPE_CHECKING:
    from torch import nn

    from ...layers.modules import QuantizedLayer


def write(
    layers: "Mapping[str, QuantizedLayer]", model: "nn.Module", directory: Path, modes: Modes, deployment: Deployment
) -> None:
    """Writes the weight file and the description of a checkpoint in format `ascend` into `directory`: the integer
    `layers`, and the other tensors of `model`. `modes` has the permissions of new files. Takes from `deployment` the
    noise levels of the denoising steps, and the types of attention."""
    from .write import write_ascend

    write_ascend(layers, model, directory, modes, timesteps=deployment.timesteps, attention=deployment.attention)


def read(directory: Path) -> Readable:
    """Opens the ascend checkpoint in `directory`, to read its integer layers one by one.

    Raises FileError for files that are missing or damaged.
    """
    from .read import AscendLayers

    return AscendLayers(directory)


def find(directory: Path) -> Path | None:
    """Returns the path of an ascend checkpoint: `directory` or its subfolder "ascend", whichever holds a description
    (the JSON file that gives the scheme of each tensor), tried in this order. Returns None if neither holds one."""
    folders = (directory, directory / "ascend")
    return next((folder for folder in folders if any(folder.glob(DESCRIPTION_FILE.format("*")))), None)


def describe(path: Path) -> Description:
    """Describes the ascend checkpoint at `path`: how many weights have each scheme, how many attention modules each
    type of quantized attention, and, if it has W8A8_TIMESTEP layers, the number and the noise levels of the denoising
    steps that it was written for.

    Raises FileError for files that are missing or damaged.
    """
    checkpoint = Checkpoint(path)
    schemes = Counter(word for key, word in checkpoint.description.items() if key.endswith(".weight"))
    lines = [("weights", ", ".join(f"{count} {scheme}" for scheme, count in schemes.most_common()))]
    if types := Counter(checkpoint.attention.values()):
        lines.append(("attention", ", ".join(f"{count} {type}" for type, count in types.most_common())))
    if levels := checkpoint.levels:
        lines.append(("steps", f"{len(levels)}, at noise levels {levels[0]:g} to {levels[-1]:g}"))
    return Description(f"an Ascend checkpoint, {checkpoint.scheme}", tuple(lines), dict(schemes))


FORMATS = (
    Format(
        name="ascend",
        files=r"quant_model_(weight|description)_w8a\d+(_dynamic|_timestep|_mxfp8)?(_\d+)?\.(safetensors|json)",
        writer=write,
        schemes=(STATIC, TIMESTEP, DYNAMIC, WEIGHT_ONLY, MXFP8),
        clamping=True,
        attention=ASCEND,
        transforms=("Multiply",),
        consumer="MindIE-SD",
        find=find,
        check=check,
        optional=frozenset({"in bfloat16"}),
        describe=describe,
        read=read,
        kept_float=kept_float,
    ),
)
