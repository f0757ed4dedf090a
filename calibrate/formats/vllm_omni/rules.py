"""Defines the keys of vLLM-Omni's quantization_config for int8, and which models it can load. Importing this module
needs no torch."""

from collections.abc import Mapping
from typing import Any

from ..native import reason_against
from .models import MODELS, UNTHREADED

METHOD = "int8"  # quant_method in config.json
SCHEME, SERIALIZED, IGNORED = "activation_scheme", "is_checkpoint_int8_serialized", "ignored_layers"
DYNAMIC_WORD = "dynamic"  # the only value of SCHEME
KEYS = ("quant_method", SCHEME, SERIALIZED, IGNORED)  # all keys that vLLM-Omni accepts


def refusal(model: str, config: Mapping[str, Any]) -> str | None:
    """Returns why vLLM-Omni cannot load int8 layers of the model class `model`, with advice; None if it can."""
    return reason_against(model, MODELS, UNTHREADED, "vLLM-Omni") or None
