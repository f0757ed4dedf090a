"""Format `ascend`: what msModelSlim writes and MindIE-SD reads, in Ascend's words (see `check` for what reads it).

One safetensors file and a JSON description that maps every tensor's name to its scheme. The numbers are those of the
layers, renamed; nothing is computed here.
"""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from capture.files import Modes, create

from ..errors import CalibrateError
from ..layers import QuantizedConv2d, QuantizedLayer, names_of
from ..tensors import Planned, write_tensors

WEIGHT_FILE = "quant_model_weight_{}.safetensors"
DESCRIPTION_FILE = "quant_model_description_{}.json"
MODEL_TYPE = "model_quant_type"
GEOMETRY = "octavo.geometry"  # of convolutions, in the metadata of the weight file


def scheme_of(layers: Mapping[str, QuantizedLayer]) -> str:
    """The description's word for these layers."""
    return "W8A16" if all(layer.weight_only for layer in layers.values()) else "W8A8"


def file_names(scheme: str) -> tuple[str, str]:
    """The names under which the consumer looks for weights and description."""
    return WEIGHT_FILE.format(scheme.lower()), DESCRIPTION_FILE.format(scheme.lower())


def write_ascend(
    layers: Mapping[str, QuantizedLayer],
    model: nn.Module,
    directory: Path,
    modes: Modes,
    names: tuple[str, str] | None = None,
) -> None:
    """Writes both files into an existing directory. `model` is the float one, or the one `layers` are installed in.

    Raises CalibrateError 6 when a number that would be written is not finite.
    """
    weight_name, description_name = names or file_names(scheme_of(layers))
    tensors, description = view(layers, model)
    text = json.dumps(description, indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_tensors(directory / weight_name, tensors, _geometry(layers), modes.data)
    with create(directory / description_name, modes.data) as sink:
        sink.write(text.encode())


def view(layers: Mapping[str, QuantizedLayer], model: nn.Module) -> tuple[dict[str, Planned], dict[str, str]]:
    """Every tensor of the checkpoint and the description, by name."""
    scheme = scheme_of(layers)
    tensors: dict[str, Planned] = {}
    description = {MODEL_TYPE: scheme}
    names = names_of(model)
    for first, layer in layers.items():
        for name in names[first]:
            for key, tensor in layer_tensors(layer):
                tensors[f"{name}.{key}"] = tensor
                description[f"{name}.{key}"] = "FLOAT" if key == "bias" else scheme
    owners = {name for first in layers for name in names[first]}
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[0] not in owners and isinstance(tensor, Tensor):
            check_finite_tensor(name, tensor)
            tensors[name] = Planned.of(tensor)
            description[name] = "FLOAT"
    return tensors, description


def check_finite_tensor(name: str, tensor: Tensor) -> None:
    """Raises CalibrateError 6 for NaN and infinities."""
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise CalibrateError(f"{name}: holds values that are not finite; not written. Check the model's files.", 6)


def layer_tensors(layer: QuantizedLayer) -> Iterator[tuple[str, Planned]]:
    """The tensors of one layer in Ascend's words, by their last name."""
    outputs = layer.weight.shape[0]
    yield "weight", Planned.of(layer.weight)
    yield "weight_scale", Planned.of(layer.weight_scale.view(outputs, 1))
    yield "weight_offset", Planned(torch.float32, (outputs, 1), partial(torch.zeros, outputs, 1))
    if layer.bias is not None:
        yield "bias", Planned.of(layer.bias)
    if layer.weight_only:
        return
    yield "input_scale", Planned.of(layer.input_scale.to(layer.dtype).view(1))
    yield "input_offset", Planned.of(layer.input_zero_point.to(layer.dtype).view(1))
    yield "deq_scale", Planned.of(layer.deq if layer.dtype == torch.bfloat16 else packed(layer.deq))
    yield "quant_bias", Planned.of(layer.quant_bias)


def packed(deq: Tensor) -> Tensor:
    """The bits of float32 numbers in the low half of int64, as the device's matmul takes them."""
    return deq.view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def unpacked(deq_scale: Tensor) -> Tensor:
    """The float32 numbers of `packed`."""
    return deq_scale.to(torch.int32).view(torch.float32)


def _geometry(layers: Mapping[str, QuantizedLayer]) -> dict[str, str]:
    found: dict[str, Any] = {n: x.geometry._asdict() for n, x in layers.items() if isinstance(x, QuantizedConv2d)}
    return {GEOMETRY: json.dumps(found, sort_keys=True)} if found else {}
