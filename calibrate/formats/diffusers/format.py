"""The record of the format `diffusers`. Importing this module needs no torch."""

from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.capture.files import Modes

from ..record import Deployment, Description, Format
from ..verdict import OCTAVO
from .check import check
from .directory import CONFIG_FILE, MODEL_FILES, Model, find_method
from .structure import QUANT_METHOD, Structure

if TYPE_CHECKING:
    from torch import nn

    from ...layers.modules import QuantizedLayer


def write(
    layers: "Mapping[str, QuantizedLayer]", model: "nn.Module", directory: Path, modes: Modes, deployment: Deployment
) -> None:
    """Writes config and weights."""
    from .write import write_diffusers

    write_diffusers(layers, model, directory, modes, parameters=deployment.parameters, shard=deployment.shard)


def describe(place: Path) -> Description:
    """Describes a directory: the class of the model, and how many layers have which scheme. Raises FileError."""
    model = Model.open(place)
    schemes = Counter(
        kind.scheme for kind in Structure.read(model.quantization, str(place / CONFIG_FILE)).kinds.values()
    )
    line = ", ".join(f"{count} {scheme}" for scheme, count in schemes.most_common())
    title = f"a {model.config.get('_class_name')} for diffusers with octavo"
    return Description(title, (("layers", line),), dict(schemes))


FORMATS = (
    Format(
        name="diffusers",
        files=MODEL_FILES,
        writer=write,
        transforms=("Multiply",),
        consumer=OCTAVO,
        find=partial(find_method, method=QUANT_METHOD, folder="diffusers"),
        check=check,
        describe=describe,
        folds=True,
        is_model=True,
    ),
)
