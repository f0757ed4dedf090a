"""Defines the keys of vLLM-Omni's quantization_config for int8, and decides which models and layers vLLM-Omni can load
as int8. Importing this module needs no torch."""

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
    """Returns the names of the layers that have to stay float because vLLM-Omni can only hold them as float, or joins
    them with such a layer. They are among `names`, the layers of `model` that would become integers."""
    kind = type(model).__name__
    return set(names) - MODELS[kind].written(names, linears_in(model)) if kind in MODELS else set()


def refusal(model: str, config: Mapping[str, Any]) -> str | None:
    """Returns the reason why vLLM-Omni cannot load int8 layers of the model class `model`, and what the user can do;
    None if it can load them. `config`, the model's configuration, makes no difference."""
    return reason_against(model, MODELS, UNTHREADED, "vLLM-Omni") or None
