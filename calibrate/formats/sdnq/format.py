"""Defines the `Format` object of the format `sdnq`. Importing this module needs no torch."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.capture.files import Modes

from ...layers.schemes import DYNAMIC, WEIGHT_ONLY
from ..diffusers.directory import MODEL_FILES, Model, find_intact
from ..record import Deployment, Description, Format
from .check import CONSUMER, check
from .rules import METHOD, kept_float

if TYPE_CHECKING:
    from torch import nn

    from ...layers.modules import QuantizedLayer


def write(
    layers: "Mapping[str, QuantizedLayer]", model: "nn.Module", directory: Path, modes: Modes, deployment: Deployment
) -> None:
    """Writes config.json and the weights of `model`, with the integer `layers` in place of its float layers, into
    `directory`, in format `sdnq`. `modes` has the permissions of new files. Takes from `deployment` the float
    parameters that smoothing factors were folded into, and the largest size of a weight file."""
    from .write import write_sdnq

    write_sdnq(layers, model, directory, modes, parameters=deployment.parameters, shard=deployment.shard)


def describe(path: Path) -> Description:
    """Describes the model in format `sdnq` at `path`: its class, and the number of its int8 layers.

    Raises FileError for files that are missing or damaged.
    """
    model = Model.open(path)
    kind, count = model.quantization.get("weights_dtype", "int8"), len(model.int8_layers)
    title = f"a {model.config.get('_class_name')} for diffusers with sdnq"
    return Description(title, (("layers", f"{count} int8, weights_dtype {kind}"),), {"int8": count})


FORMATS = (
    Format(
        name="sdnq",
        files=MODEL_FILES,
        writer=write,
        schemes=(DYNAMIC, WEIGHT_ONLY),
        mixed=False,
        consumer=CONSUMER,
        find=partial(find_intact, method=METHOD, folder="sdnq"),
        check=check,
        describe=describe,
        kept_float=kept_float,
        folds=True,
        made_biases=False,
    ),
)
