"""Defines the `Format` object of the format `sglang`. Importing this module needs no torch."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.capture.files import Modes

from ...layers.schemes import DYNAMIC, STATIC
from ..diffusers.directory import MODEL_FILES
from ..record import Deployment, Description, Format
from .check import CONSUMER, check, foreign, read_files
from .rules import DESCRIPTION_FILE, refusal

if TYPE_CHECKING:
    from torch import nn

    from ...layers.modules import QuantizedLayer


def write(
    layers: "Mapping[str, QuantizedLayer]", model: "nn.Module", directory: Path, modes: Modes, deployment: Deployment
) -> None:
    """Writes config.json, the description and the weights of `model`, with the integer `layers` in place of its float
    layers, into `directory`, in format `sglang`. `modes` are the permissions; `deployment` has the folded parameters
    and the size limit of weight files."""
    from .write import write_sglang

    write_sglang(layers, model, directory, modes, parameters=deployment.parameters, shard=deployment.shard)


def find(directory: Path) -> Path | None:
    """Returns the path of a checkpoint for SGLang, `directory` or its subfolder "sglang"; None if neither holds a
    description under the name that SGLang looks for first."""
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
        schemes=(STATIC, DYNAMIC),
        consumer=CONSUMER,
        find=find,
        check=check,
        foreign=foreign,
        describe=describe,
        folds=True,
        alone=True,
        made_biases=False,
        refusal=refusal,
    ),
)
