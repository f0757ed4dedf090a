"""The record of the format `ascend`."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from octavo.capture.files import Modes

from ...layers.modules import QuantizedLayer
from ...layers.transforms import Multiply
from ..record import Deployment, Description, Format
from .check import check
from .checkpoint import Checkpoint
from .difference import difference
from .read import read_layer
from .write import DESCRIPTION_FILE, write_ascend


class Opened:
    """An ascend checkpoint whose integer layers can be put into the float model it was made from."""

    def __init__(self, directory: Path) -> None:
        self._checkpoint = Checkpoint(directory)

    @property
    def layer_names(self) -> list[str]:
        """The names of the quantized layers."""
        return self._checkpoint.layer_names

    def layer(self, name: str) -> QuantizedLayer:
        """Reads one quantized layer."""
        return read_layer(self._checkpoint, name)

    def difference(self, model: nn.Module) -> str | None:
        """The first sign that the checkpoint was not made from the float `model`; None where there is none."""
        return difference(self._checkpoint, model)


def write(
    layers: Mapping[str, QuantizedLayer], model: nn.Module, directory: Path, modes: Modes, deployment: Deployment
) -> None:
    """Writes weights and description."""
    write_ascend(layers, model, directory, modes, timesteps=deployment.timesteps)


def find(directory: Path) -> Path | None:
    """The directory itself, where it holds a description."""
    return directory if any(directory.glob(DESCRIPTION_FILE.format("*"))) else None


def describe(place: Path) -> Description:
    """Describes a checkpoint: its schemes, and the noise levels that its rows are for. Raises FileError."""
    checkpoint = Checkpoint(place)
    schemes = Counter(word for key, word in checkpoint.description.items() if key.endswith(".weight"))
    lines = [("weights", ", ".join(f"{count} {scheme}" for scheme, count in schemes.most_common()))]
    if levels := checkpoint.levels:
        lines.append(("steps", f"{len(levels)}, at noise levels {levels[0]:g} to {levels[-1]:g}"))
    return Description(f"an Ascend checkpoint, {checkpoint.scheme}", tuple(lines), dict(schemes))


FORMATS = (
    Format(
        name="ascend",
        files=r"quant_model_(weight|description)_w8a\d+(_dynamic|_timestep)?(_\d+)?\.(safetensors|json)",
        writer=write,
        transforms=(Multiply,),
        dtypes=(torch.float16, torch.bfloat16, torch.float32),
        consumer="MindIE-SD",
        find=find,
        check=check,
        optional=frozenset({"in bfloat16"}),
        describe=describe,
        read=Opened,
    ),
)
