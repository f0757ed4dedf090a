"""Defines the names of files and keys in SGLang's int8 checkpoints, and decides which models and layers SGLang can load
as int8. Importing this module needs no torch."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from ..native import linears_in, reason_against
from .models import MODELS, UNTHREADED

if TYPE_CHECKING:
    from torch import nn

DESCRIPTION_FILE = "quant_model_description.json"  # the first name that SGLang looks for
DESCRIPTIONS = "quant_model_description*.json"  # the names that it looks for after that, in sorted order
FLOAT, IGNORE = "FLOAT", "ignore"


def kept_float(model: "nn.Module", names: Collection[str]) -> set[str]:
    """Returns the names of the layers that have to stay float because SGLang can only hold them as float. They are
    among `names`, the layers of `model` that would become integers."""
    kind = type(model).__name__
    return set(names) - MODELS[kind].written(names, linears_in(model)) if kind in MODELS else set()


def refusal(model: str, config: Mapping[str, Any]) -> str | None:
    """Returns the reason why SGLang cannot load int8 layers of the model class `model`, and what the user can do; None
    if it can load them. `config`, the model's configuration, makes no difference."""
    return reason_against(model, MODELS, UNTHREADED, "SGLang") or None
