"""Defines the `Format` object of the format `sglang`. Importing this module needs no torch."""

from collections import Counter
from pathlib import Path

from ...layers.schemes import DYNAMIC, MXFP8, STATIC
from ..diffusers.directory import MODEL_FILES
from ..record import Description, Format, model_writer
from .check import CONSUMER, check, foreign, read_files
from .rules import DESCRIPTION_FILE, kept_float, refusal


def find(directory: Path) -> Path | None:
    """Returns the path of a checkpoint for SGLang: `directory` or its subfolder "sglang", whichever holds a file
    quant_model_description.json, tried in this order. Returns None if neither holds one."""
    folders = (directory, directory / "sglang")
    return next((folder for folder in folders if (folder / DESCRIPTION_FILE).is_file()), None)


def describe(path: Path) -> Description:
    """Describes the checkpoint for SGLang at `path`: the class of the model, and the number of layers of each scheme.

    Raises FileError for files that are missing or damaged.
    """
    files = read_files(path)
    schemes = Counter(files.schemes.values())
    line = ", ".join(f"{count} {scheme}" for scheme, count in schemes.most_common())
    return Description(f"a {files.kind or 'model'} for SGLang on Ascend", (("layers", line),), dict(schemes))


FORMATS = (
    Format(
        name="sglang",
        files=rf"{MODEL_FILES}|quant_model_description\.json",
        writer=model_writer("octavo.calibrate.formats.sglang.write:write_sglang"),
        schemes=(STATIC, DYNAMIC, MXFP8),
        clamping=True,
        consumer=CONSUMER,
        find=find,
        check=check,
        foreign=foreign,
        describe=describe,
        folds=True,
        alone=True,
        made_biases=False,
        refusal=refusal,
        kept_float=kept_float,
        dtypes=("bfloat16",),
    ),
)
