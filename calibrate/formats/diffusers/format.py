"""Defines the `Format` object of the format `diffusers`. Importing this module needs no torch."""

from collections import Counter
from functools import partial
from pathlib import Path

from ...layers.schemes import DYNAMIC, FP8_SCHEMES, STATIC, TIMESTEP, WEIGHT_ONLY
from ..record import Description, Format, model_writer
from ..verdict import OCTAVO
from .check import check
from .directory import CONFIG_FILE, MODEL_FILES, Model, find_method
from .structure import QUANT_METHOD, Structure


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
        writer=model_writer("octavo.calibrate.formats.diffusers.write:write_diffusers"),
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
