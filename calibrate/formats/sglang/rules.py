"""Defines the names in SGLang's int8 checkpoints, and which models it can load. Importing this needs no torch."""

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
    """Returns those of the layers `names` of `model`, which would become integers, that the runtime holds only as
    float."""
    kind = type(model).__name__
    return set(names) - MODELS[kind].written(names, linears_in(model)) if kind in MODELS else set()


def refusal(model: str, config: Mapping[str, Any]) -> str | None:
    """Returns why SGLang cannot load int8 layers of the model class `model`, with advice; None if it can."""
    return reason_against(model, MODELS, UNTHREADED, "SGLang") or None
