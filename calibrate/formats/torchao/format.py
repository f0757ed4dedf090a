"""Defines the `Format` object of the format `torchao`. Importing this module needs no torch."""

from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.capture.files import Modes

from ...layers.schemes import DYNAMIC, FP8_DYNAMIC, FP8_WEIGHT_ONLY, STATIC, WEIGHT_ONLY
from ..diffusers.directory import MODEL_FILES, Model, find_method
from ..native import not_linear
from ..record import Deployment, Description, Format
from ..verdict import TORCHAO
from .check import WEIGHT, ZEROS, check

if TYPE_CHECKING:
    from torch import nn

    from ...layers.modules import QuantizedLayer


def write(
    layers: "Mapping[str, QuantizedLayer]", model: "nn.Module", directory: Path, modes: Modes, deployment: Deployment
) -> None:
    """Writes config.json and the weights of `model`, with the integer `layers` in place of its float layers, into
    `directory`, in format `torchao`. `modes` has the permissions of new files. Takes from `deployment` the float
    parameters that smoothing factors were folded into, the number of axes of each layer's input, and the largest size
    of a weight file."""
    from .write import write_torchao

    write_torchao(
        layers, model, directory, modes, parameters=deployment.parameters, axes=deployment.axes, shard=deployment.shard
    )


def describe(path: Path) -> Description:
    """Describes the model in format `torchao` at `path`: its class, and the number of its int8 and FP8 weights.

    Raises FileError for files that are missing or damaged.
    """
    model = Model.open(path)
    weights = [tensor.stored.dtype for name, tensor in model.tensors.items() if name.endswith(f"{WEIGHT}qdata")]
    counts = Counter("Int8Tensor" if dtype == "int8" else "Float8Tensor" for dtype in weights) or {"Int8Tensor": 0}
    title = f"a {model.config.get('_class_name')} for diffusers with torchao"
    fact = " and ".join(f"{count} {kind}" for kind, count in counts.items())
    return Description(title, (("layers", fact),), dict(counts))


FORMATS = (
    Format(
        name="torchao",
        files=MODEL_FILES,
        writer=write,
        transforms=("Multiply",),
        plain=(FP8_DYNAMIC, FP8_WEIGHT_ONLY),
        schemes=(STATIC, DYNAMIC, WEIGHT_ONLY, FP8_DYNAMIC, FP8_WEIGHT_ONLY),
        consumer=TORCHAO,
        find=partial(find_method, method="torchao", folder="torchao"),
        check=check,
        optional=frozenset({ZEROS}),
        describe=describe,
        kept_float=not_linear,
        folds=True,
    ),
)
