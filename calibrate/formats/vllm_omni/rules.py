"""Defines the keys of vLLM-Omni's quantization_config for int8, and which models it can load. Importing this module
needs no torch."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from ..native import linears_in, reason_against
from .models import MODELS, UNTHREADED

if TYPE_CHECKING:
    from torch import nn

METHOD = "int8"  # quant_method in config.json
SCHEME, SERIALIZED, IGNORED = "activation_scheme", "is_checkpoint_int8_serialized", "ignored_layers"
DYNAMIC_WORD = "dynamic"  # the only value of SCHEME
KEYS = ("quant_method", SCHEME, SERIALIZED, IGNORED)  # all keys that vLLM-Omni accepts


def kept_float(model: "nn.Module", names: Collection[str]) -> set[str]:
    """Returns those of the layers `names` of `model`, which would become integers, that the runtime holds only as
    float."""
    kind = type(model).__name__
    return set(names) - MODELS[kind].written(names, linears_in(model)) if kind in MODELS else set()


def refusal(model: str, config: Mapping[str, Any]) -> str | None:
    """Returns why vLLM-Omni cannot load int8 layers of the model class `model`, with advice; None if it can."""
    return reason_against(model, MODELS, UNTHREADED, "vLLM-Omni") or None
