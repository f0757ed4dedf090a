"""Defines the names of files and keys in SGLang's 8-bit checkpoints, and decides which models and layers SGLang can
load in 8 bits. Importing this module needs no torch."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from ...layers.schemes import BLOCK, MXFP8
from ..native import linears_in, reason_against
from .models import MODELS, UNTHREADED

if TYPE_CHECKING:
    from torch import nn

DESCRIPTION_FILE = "quant_model_description.json"  # the first name that SGLang looks for
DESCRIPTIONS = "quant_model_description*.json"  # the names that it looks for after that, in sorted order
FLOAT, IGNORE = "FLOAT", "ignore"
_PAIRS = 2 * BLOCK  # SGLang joins the scales of two blocks to a pair, and does not pad an odd number of blocks


def fits(inputs: int, scheme: str) -> bool:
    """Returns whether SGLang can load a layer of `scheme` with this number of inputs."""
    return scheme != MXFP8 or inputs % _PAIRS == 0


def kept_float(model: "nn.Module", names: Collection[str], scheme: str) -> set[str]:
    """Returns the names of the layers that have to stay float because SGLang can only hold them as float. They are
    among `names`, the layers of `model` that would become 8-bit layers of `scheme`."""
    kind = type(model).__name__
    weights = {name: model.get_parameter(f"{name}.weight") for name in names}
    fitting = [name for name, weight in weights.items() if fits(weight.shape[1], scheme)]
    return set(names) - MODELS[kind].written(fitting, linears_in(model)) if kind in MODELS else set()


def refusal(model: str, config: Mapping[str, Any]) -> str | None:
    """Returns the reason why SGLang cannot load 8-bit layers of the model class `model`, and what the user can do; None
    if it can load them. `config`, the model's configuration, makes no difference."""
    return reason_against(model, MODELS, UNTHREADED, "SGLang") or None
