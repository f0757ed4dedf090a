"""Defines the `Format` object of the format `vllm-omni`. Importing this module needs no torch."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.capture.files import Modes

from ...layers.schemes import DYNAMIC
from ..diffusers.directory import MODEL_FILES, Model, find_intact
from ..record import Deployment, Description, Format
from .check import CONSUMER, ON_ASCEND, check
from .rules import METHOD, kept_float, refusal

if TYPE_CHECKING:
    from torch import nn

    from ...layers.modules import QuantizedLayer


def write(
    layers: "Mapping[str, QuantizedLayer]", model: "nn.Module", directory: Path, modes: Modes, deployment: Deployment
) -> None:
    """Writes config.json and the weights of `model`, with the integer `layers` in place of its float layers, into
    `directory`, in format `vllm-omni`. `modes` has the permissions of new files. Takes from `deployment` the float
    parameters that smoothing factors were folded into, and the largest size of a weight file."""
    from .write import write_vllm_omni

    write_vllm_omni(layers, model, directory, modes, parameters=deployment.parameters, shard=deployment.shard)


def describe(path: Path) -> Description:
    """Describes the model in format `vllm-omni` at `path`: its class, and the number of its int8 layers.

    Raises FileError for files that are missing or damaged.
    """
    model = Model.open(path)
    count = len(model.int8_layers)
    title = f"a {model.config.get('_class_name')} for vLLM-Omni"
    return Description(title, (("layers", f"{count} {DYNAMIC}"),), {DYNAMIC: count})


FORMATS = (
    Format(
        name="vllm-omni",
        files=MODEL_FILES,
        writer=write,
        schemes=(DYNAMIC,),
        consumer=CONSUMER,
        find=partial(find_intact, method=METHOD, folder="vllm-omni"),
        check=check,
        optional=frozenset({ON_ASCEND}),
        describe=describe,
        folds=True,
        alone=True,
        made_biases=False,
        refusal=refusal,
        kept_float=kept_float,
    ),
)
