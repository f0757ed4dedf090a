"""Defines the `Format` object of the format `sdnq`. Importing this module needs no torch."""

from functools import partial
from pathlib import Path

from ...layers.schemes import DYNAMIC, WEIGHT_ONLY
from ..diffusers.directory import MODEL_FILES, Model, find_intact
from ..record import Description, Format, model_writer
from .check import CONSUMER, check
from .rules import METHOD, kept_float


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
        writer=model_writer("octavo.calibrate.formats.sdnq.write:write_sdnq"),
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
