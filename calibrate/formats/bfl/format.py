"""Defines the `Format` object of the format `bfl`. Importing this module needs no torch."""

from functools import partial
from pathlib import Path

from ...layers.schemes import FP8_DYNAMIC
from ..diffusers.directory import MODEL_FILES, Model, find_intact
from ..record import Description, Format, model_writer
from .check import CONSUMER, check, fp8_layers
from .rules import METHOD, kept_float, refusal


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
        writer=model_writer("octavo.calibrate.formats.bfl.write:write_bfl"),
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
