"""Defines the names and rules by which diffusers 0.42.1 reads the layout `fp8r` of Black Forest Labs (its
`quantizers.bfl`). Importing this module needs no torch.

- `from_single_file` with a BFLQuantizationConfig reads one file. A layer X is quantized if the file has X.weight_scale:
  X.weight is then float8_e4m3fn (out, in), and X.weight_scale float32 (out,). A weight of another dtype is an error.
- If the tensors, without the scales, have exactly the names in diffusers, no name is converted.
- A float8_e4m3fn weight without a scale becomes a float weight as it is, up to 448, without an error.
- On CUDA from compute capability 8.9 on, a layer whose numbers of channels are multiples of 16 divides each token of
  its input by its largest absolute value over 448, rounds to e4m3 and multiplies FP8 matrices. Elsewhere the weight
  becomes float and the input stays float.
- A layer in one of the model's `_keep_in_fp32_modules` becomes float.
- The dtype of a model is that of its first parameter. Pipelines cast their inputs to it.
"""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from ..native import not_linear
from ..sdnq.rules import in_float32

if TYPE_CHECKING:
    from torch import nn

METHOD = "bfl"  # quant_method in config.json


def refusal(kind: str, config: Mapping[str, Any]) -> str | None:
    """Returns the reason why diffusers' `from_single_file` cannot load a denoiser of the class `kind`, with advice on
    what to do instead; None if it can load such a denoiser. `config` is not used, but the function `refusal` of every
    format takes it."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    if kind in SINGLE_FILE_LOADABLE_CLASSES:
        return None
    return f"diffusers loads no single file of a {kind}. Use --format torchao."


def kept_float(model: "nn.Module", names: Collection[str], scheme: str) -> set[str]:
    """Returns those of the layers `names` of `model`, which would become 8-bit layers, that have to stay float: those
    that are not linear or that diffusers keeps in float32; and the layer of the model's first parameter, so that the
    model has the dtype of a float parameter."""
    floats = not_linear(model, names) | {name for name in names if in_float32(model, name)}
    parameters = (name for name, parameter in model.named_parameters() if parameter.is_floating_point())
    first = next((name for name in parameters if not in_float32(model, name)), "")
    return floats | ({first.rpartition(".")[0]} & set(names))
