"""Defines the `Format` object of the format `bfl`. Importing this module needs no torch."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.capture.files import Modes

from ...layers.schemes import FP8_DYNAMIC
from ..diffusers.directory import MODEL_FILES, Model, find_intact
from ..record import Deployment, Description, Format
from .check import CONSUMER, check, fp8_layers
from .rules import METHOD, kept_float, refusal

if TYPE_CHECKING:
    from torch import nn

    from ...layers.modules import QuantizedLayer


def write(
    layers: "Mapping[str, QuantizedLayer]", model: "nn.Module", directory: Path, modes: Modes, deployment: Deployment
) -> None:
    """Writes config.json and the weight file of `model`, with the FP8 `layers` in place of its float layers, into
    `directory`. `modes` has the permissions of new files. Takes from `deployment` the float parameters that smoothing
    factors were folded into."""
    from .write import write_bfl

    write_bfl(layers, model, directory, modes, parameters=deployment.parameters)


def describe(path: Path) -> Description:
    """Describes the model in format `bfl` at `path`: its class, and the number of its FP8 layers.

    Raises FileError for files that are missing or damaged.
    """
    model = Model.open(path)
    count = len(fp8_layers(model))
    title = f"a {model.config.get('_class_name')} for diffusers in the layout fp8r of Black Forest Labs"
    return Description(title, (("layers", f"{count} FP8"),), {FP8_DYNAMIC: count})


FORMATS = (
    Format(
        name="bfl",
        files=MODEL_FILES,
        writer=write,
        schemes=(FP8_DYNAMIC,),
        mixed=False,
        consumer=CONSUMER,
        find=partial(find_intact, method=METHOD, folder="bfl"),
        check=check,
        describe=describe,
        refusal=refusal,
        kept_float=kept_float,
        folds=True,
        made_biases=False,
    ),
)
