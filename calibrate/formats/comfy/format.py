"""Defines the `Format` object of the format `comfy`. Importing this module needs no torch."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.capture.files import Modes

from ...layers.schemes import DYNAMIC
from ..record import Deployment, Format
from .names import refusal
from .structure import FILE

if TYPE_CHECKING:
    from torch import nn

    from ...layers.modules import QuantizedLayer


def write(
    layers: "Mapping[str, QuantizedLayer]", model: "nn.Module", directory: Path, modes: Modes, deployment: Deployment
) -> None:
    """Writes `model`, with the integer `layers` in place of its float layers, as one file in format `comfy` into
    `directory`. `modes` are the permissions; `deployment` has the folded parameters."""
    from .write import write_comfy

    write_comfy(layers, model, directory, modes, parameters=deployment.parameters)


FORMATS = (
    Format(
        name="comfy",
        files=re.escape(FILE),
        writer=write,
        schemes=(DYNAMIC,),
        transforms=("Rotate",),
        consumer="ComfyUI",
        refusal=refusal,
        folds=True,
        made_biases=False,
    ),
)
