"""Defines the names and rules of the library sdnq (0.2.8) for int8 checkpoints. Importing this module needs no torch.

- A layer X is quantized if it is an nn.Linear and its weight, X.weight, is not in the list `modules_to_not_convert` of
  the quantization_config.
- An int8 layer has X.weight, X.scale (float32, one number for each output channel) and X.bias if its float layer has
  one.
- sdnq multiplies integers in a layer if `use_quantized_matmul` is true, if the layer's numbers of channels suit the
  hardware (see `fits_matmul`), and if X.weight is not in the list `modules_to_not_use_matmul`.
- A layer that multiplies integers turns its input into int8 codes with a scale for each token. If a call has fewer than
  32 tokens, the input stays float. X.weight is stored as (in, out) and X.scale as (1, out).
- In all other layers the input stays float. X.weight is stored as (out, in) and X.scale as (out, 1).
- diffusers gives some modules float32 inputs, biases and scales in a model of any dtype: those that the model's class
  lists in `_keep_in_fp32_modules`. sdnq makes float weights of the model's dtype, so that such a layer ends with an
  error.
"""

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from ..native import not_linear

if TYPE_CHECKING:
    from torch import nn

METHOD = "sdnq"  # quant_method in config.json
FLOAT_LAYERS, FLOAT_INPUTS, MATMUL = "modules_to_not_convert", "modules_to_not_use_matmul", "use_quantized_matmul"
_LEAST, _MULTIPLE = 32, 16  # smallest number of channels, and the divisor of it, for a product of integers


def kept_float(model: "nn.Module", names: Collection[str], scheme: str) -> set[str]:
    """Returns the names of the layers that sdnq can hold only as float. `names` are the layers of `model` that would
    otherwise become 8-bit layers; their `scheme` makes no difference."""
    return not_linear(model, names) | {name for name in names if in_float32(model, name)}


def in_float32(model: "nn.Module", name: str) -> bool:
    """Returns whether the layer `name` is in a module that diffusers keeps in float32."""
    return not set(getattr(model, "_keep_in_fp32_modules", None) or ()).isdisjoint(name.split("."))


def fits_matmul(outputs: int, inputs: int) -> bool:
    """Returns whether sdnq can multiply integers in a layer with these numbers of output and input channels: both have
    to be at least 32 and divisible by 16."""
    return min(outputs, inputs) >= _LEAST and outputs % _MULTIPLE == 0 and inputs % _MULTIPLE == 0


def listed(parameter: str, names: Collection[Any]) -> bool:
    """Returns whether sdnq finds the parameter called `parameter`, such as "proj.weight", in the list `names` of its
    config. An entry of the list may be the name of a parameter; one part of it between dots, such as "proj"; a pattern
    with "*"; or a dot and the beginning of a name, such as ".pro"."""
    parts = parameter.split(".")
    return any(
        parameter.startswith(name[1:]) if name.startswith(".")
        else parameter == name or name in parts or ("*" in name and fnmatchcase(parameter, name + "*"))
        for name in names if isinstance(name, str)
    )  # fmt: skip


def words(config: Mapping[str, Any], key: str) -> Sequence[Any]:
    """Returns the list under `key` of the quantization_config `config`. A string is returned as a list of one string.
    If there is no such key, or its value has another type, returns []."""
    value = config.get(key)
    return value if isinstance(value, list) else [value] if isinstance(value, str) else []


def transposed(config: Mapping[str, Any], name: str, outputs: int, inputs: int) -> bool:
    """Returns whether sdnq stores the weight of the layer `name` as (in, out) and not as (out, in). `config` is the
    quantization_config; `outputs` and `inputs` are the layer's numbers of channels."""
    allowed = fits_matmul(outputs, inputs) and not listed(f"{name}.weight", words(config, FLOAT_INPUTS))
    return config.get(MATMUL) is True and allowed
