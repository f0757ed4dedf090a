"""Defines the keys of vLLM-Omni's quantization_config for int8 and MXFP8, and decides which models and layers vLLM-Omni
can load in 8 bits. Importing this module needs no torch."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ...layers.schemes import BLOCK, DYNAMIC, MXFP8
from ..native import linears_in, reason_against
from .models import MODELS, UNTHREADED

if TYPE_CHECKING:
    from torch import nn

ACTIVATIONS, IGNORED = "activation_scheme", "ignored_layers"  # keys of quantization_config
DYNAMIC_WORD = "dynamic"  # the only value of ACTIVATIONS


class Method(NamedTuple):
    """A quantization method of vLLM-Omni.

    `name` is its quant_method in config.json, `scheme` the scheme of its layers, `codes` the dtype of their weights,
    and `scales` that of their weight_scale. `serialized` is the key that says that the weights are codes already, and
    `keys` are all keys that vLLM-Omni accepts.
    """

    name: str
    scheme: str
    codes: str
    scales: str
    serialized: str
    keys: tuple[str, ...]

    def scale_shape(self, outputs: int, inputs: int) -> tuple[int, int]:
        """Returns the shape of weight_scale of a layer."""
        return outputs, -(-inputs // BLOCK) if self.scheme == MXFP8 else 1


def _method(name: str, scheme: str, codes: str, scales: str, *more: str) -> Method:
    serialized = f"is_checkpoint_{name}_serialized"
    return Method(name, scheme, codes, scales, serialized, ("quant_method", *more, serialized, IGNORED))


_METHODS = (
    _method("int8", DYNAMIC, "int8", "float32", ACTIVATIONS),
    _method("mxfp8", MXFP8, "float8_e4m3fn", "uint8"),
)
METHODS = {method.name: method for method in _METHODS}
BY_SCHEME = {method.scheme: method for method in _METHODS}


def kept_float(model: "nn.Module", names: Collection[str], scheme: str) -> set[str]:
    """Returns the names of the layers that have to stay float because vLLM-Omni can only hold them as float, or joins
    them with such a layer. They are among `names`, the layers of `model` that would become 8-bit layers. `scheme` makes
    no difference."""
    kind = type(model).__name__
    return set(names) - MODELS[kind].written(names, linears_in(model)) if kind in MODELS else set()


def refusal(model: str, config: Mapping[str, Any]) -> str | None:
    """Returns the reason why vLLM-Omni cannot load 8-bit layers of the model class `model`, and what the user can do;
    None if it can load them. `config`, the model's configuration, makes no difference."""
    return reason_against(model, MODELS, UNTHREADED, "vLLM-Omni") or None
