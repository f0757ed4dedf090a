"""Defines the names in SGLang's int8 checkpoints, and which models it can load. Importing this needs no torch."""

from collections.abc import Mapping
from typing import Any

from ..native import reason_against
from .models import MODELS, UNTHREADED

DESCRIPTION_FILE = "quant_model_description.json"  # the first name that SGLang looks for
DESCRIPTIONS = "quant_model_description*.json"  # the names that it looks for after that, in sorted order
FLOAT, IGNORE = "FLOAT", "ignore"


def refusal(model: str, config: Mapping[str, Any]) -> str | None:
    """Returns why SGLang cannot load int8 layers of the model class `model`, with advice; None if it can."""
    return reason_against(model, MODELS, UNTHREADED, "SGLang") or None
