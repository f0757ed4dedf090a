"""Defines the `Format` object of the format `diffusers`. Importing this module needs no torch."""

from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.capture.files import Modes

from ...layers.schemes import DYNAMIC, FP8_SCHEMES, STATIC, TIMESTEP, WEIGHT_ONLY
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
    """Writes config.json and the weights of `model`, with the integer `layers` in place of its float layers, into
    `directory`, in format `diffusers`. `modes` has the permissions of new files. Takes from `deployment` the float
    parameters that smoothing factors were folded into, and the largest size of a weight file."""
    from .write import write_diffusers

    write_diffusers(layers, model, directory, modes, parameters=deployment.parameters, shard=deployment.shard)


def describe(path: Path) -> Description:
    """Describes the model in format `diffusers` at `path`: its class, and the number of layers of each scheme.

    Raises FileError for files that are missing or damaged.
    """
    model = Model.open(path)
    schemes = Counter(
        kind.scheme for kind in Structure.read(model.quantization, str(path / CONFIG_FILE)).kinds.values()
    )
    line = ", ".join(f"{count} {scheme}" for scheme, count in schemes.most_common())
    title = f"a {model.config.get('_class_name')} for diffusers with octavo"
    return Description(title, (("layers", line),), dict(schemes))


FORMATS = (
    Format(
        name="diffusers",
        files=MODEL_FILES,
        writer=write,
        schemes=(STATIC, TIMESTEP, DYNAMIC, WEIGHT_ONLY, *FP8_SCHEMES),
        transforms=("Multiply", "Rotate", "MultiplyRotate"),
        consumer=OCTAVO,
        find=partial(find_method, method=QUANT_METHOD, folder="diffusers"),
        check=check,
        describe=describe,
        folds=True,
        is_model=True,
    ),
)
