"""Defines the `Format` object of the format `sglang`. Importing this module needs no torch."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.capture.files import Modes

from ...layers.schemes import DYNAMIC, MXFP8, STATIC
from ..diffusers.directory import MODEL_FILES
from ..record import Deployment, Description, Format
from .check import CONSUMER, check, foreign, read_files
from .rules import DESCRIPTION_FILE, kept_float, refusal

if TYPE_CHECKING:
    from torch import nn

    from ...layers.modules import QuantizedLayer


def write(
    layers: "Mapping[str, QuantizedLayer]", model: "nn.Module", directory: Path, modes: Modes, deployment: Deployment
) -> None:
    """Writes config.json, the description (the JSON file that gives the scheme of each tensor) and the weights of
    `model`, with the integer `layers` in place of its float layers, into `directory`, in format `sglang`. `modes` has
    the permissions of new files. Takes from `deployment` the float parameters that smoothing factors were folded into,
    and the largest size of a weight file."""
    from .write import write_sglang

    write_sglang(layers, model, directory, modes, parameters=deployment.parameters, shard=deployment.shard)


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
        writer=write,
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
