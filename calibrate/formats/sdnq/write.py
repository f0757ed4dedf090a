"""Writes the format `sdnq`: a directory that diffusers loads with the library sdnq installed, and without Octavo.

The names and the layout of the tensors are in the module `rules`. sdnq computes a W8A8_DYNAMIC layer as Octavo does,
with int8 codes of the input and a scale for each token, if the numbers of input and output channels are at least 32 and
divisible by 16. All other W8A8_DYNAMIC layers, and all W8A16 layers, are listed in `modules_to_not_use_matmul`, so that
their inputs stay float.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from octavo.capture.errors import UsageError
from octavo.capture.files import Modes
from octavo.capture.tensors import Planned

from ...layers.install import names_of
from ...layers.modules import QuantizedLayer
from ...layers.schemes import DYNAMIC, WEIGHT_ONLY
from ..diffusers.write import NONE, SHARD, config_of, write_config, write_weights
from ..linears import check_linears, linear_tensors
from .rules import FLOAT_INPUTS, FLOAT_LAYERS, MATMUL, METHOD, fits_matmul, in_float32


def write_sdnq(
    layers: Mapping[str, QuantizedLayer],
    model: nn.Module,
    directory: Path,
    modes: Modes,
    *,
    parameters: Mapping[str, Callable[[], Tensor]] = NONE,
    shard: int = SHARD,
) -> None:
    """Writes config.json and the weights of `model`, with the integer `layers` in place of its float layers, into an
    existing directory. `modes` has the permissions of new files.

    `parameters` are the float parameters with smoothing factors folded in, a dict from name to a function that returns
    the new value. Weights of more than `shard` bytes are split into several files with an index. Raises UsageError for
    a layer that the format cannot hold and for a model that is not a diffusers model, NumbersError for a number to be
    written that is not finite.
    """
    config = config_of(model)
    check_linears("sdnq", layers, (DYNAMIC, WEIGHT_ONLY), "Use --activations dynamic.")
    _check_modules(layers, model)
    tensors = linear_tensors(layers, model, parameters, _parts)
    write_config(directory, config | {"quantization_config": _quantization_config(layers, model)}, modes)
    write_weights(directory, tensors, {}, modes, shard)


def _check_modules(layers: Mapping[str, QuantizedLayer], model: nn.Module) -> None:
    """Raises UsageError for a layer that the format cannot hold, for one of three reasons:
    - the layer is used under several names, of which sdnq replaces only one
    - the layer's float layer is not of the class nn.Linear itself, the only class that sdnq replaces
    - diffusers gives the layer inputs in float32, which sdnq does not multiply by weights of another dtype
    """
    names = names_of(model)
    for name in layers:
        if len(names[name]) > 1:
            fact = f"is used under the names {name} and {names[name][1]}, of which sdnq replaces one only"
            raise UsageError(f"format sdnq: {name} {fact}. Keep the layer float.")
        if in_float32(model, name):
            fact = "gets inputs in float32 from diffusers, which sdnq does not multiply by weights of another dtype"
            raise UsageError(f"format sdnq: {name} {fact}. Keep the layer float.")
        module = model.get_submodule(name)
        if type(module).__name__ != "Linear" and not isinstance(module, QuantizedLayer):
            fact = f"is a {type(module).__name__}, and sdnq replaces layers of the class Linear only"
            raise UsageError(f"format sdnq: {name} {fact}. Keep the layer float.")


def _parts(name: str, layer: QuantizedLayer) -> Iterator[tuple[str, Planned]]:
    outputs, inputs = layer.weight.shape
    across = _as_integers(layer)
    shape = (inputs, outputs) if across else (outputs, inputs)
    yield "weight", Planned(layer.weight.dtype, shape, partial(_laid_out, layer.weight, across))
    yield "scale", Planned.of(layer.weight_scale.view((1, outputs) if across else (outputs, 1)))
    if layer.bias is not None:
        yield "bias", Planned.of(layer.bias)


def _laid_out(weight: Tensor, across: bool) -> Tensor:
    return weight.detach().t().contiguous() if across else weight.detach()


def _as_integers(layer: QuantizedLayer) -> bool:
    outputs, inputs = layer.weight.shape
    return layer.scheme == DYNAMIC and fits_matmul(outputs, inputs)


def _quantization_config(layers: Mapping[str, QuantizedLayer], model: nn.Module) -> dict[str, Any]:
    floats = (name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in layers)
    return {
        "quant_method": METHOD,
        "weights_dtype": "int8",
        "quantized_matmul_dtype": "int8",
        "group_size": -1,  # one scale for each output channel
        "dequantize_fp32": True,
        "use_hadamard": False,
        "use_svd": False,
        "quant_conv": False,
        "quant_embedding": False,
        "add_skip_keys": False,
        MATMUL: any(_as_integers(layer) for layer in layers.values()),
        FLOAT_INPUTS: sorted(f"{name}.weight" for name, layer in layers.items() if not _as_integers(layer)),
        FLOAT_LAYERS: sorted(f"{name}.weight" for name in floats),
    }
