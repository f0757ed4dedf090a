"""Writes the format `ascend`, the layout that msModelSlim writes and MindIE-SD reads, in Ascend's names.

One safetensors file and a JSON description that maps every tensor's name to its scheme. The numbers are those of the
layers, renamed; nothing is computed here. Layers of several schemes may be in one file.

The rows of a W8A8_TIMESTEP layer are indexed by the denoising step of the deployment. The metadata say which noise
level each row is for and where a layer's bins end, so that this package reads its bins back. A layer X with a
multiplier of its input has X.div.mul_scale, and its other tensors under X.linear.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octavo.capture.files import Modes, create
from octavo.capture.paging import page_out
from octavo.capture.tensors import Planned, write_tensors

from ...layers.freeze import packed
from ...layers.install import all_names
from ...layers.modules import QuantizedConv2d, QuantizedLayer
from ...layers.weights import check_finite_tensor
from ..corrections import corrected
from .names import CORRECTED, EDGES, GEOMETRY, INNER, LEVELS, MADE_BIASES, MODEL_TYPE, MUL_SCALE, file_names
from .step_rows import deployed_levels, rows_of


def scheme_of(layers: Mapping[str, QuantizedLayer]) -> str:
    """The scheme of the checkpoint: the one that all layers have, or W8A8 for a mixture, which has no name."""
    schemes = {layer.scheme for layer in layers.values()}
    return schemes.pop() if len(schemes) == 1 else "W8A8"


def write_ascend(
    layers: Mapping[str, QuantizedLayer],
    model: nn.Module,
    directory: Path,
    modes: Modes,
    names: tuple[str, str] | None = None,
    *,
    timesteps: Sequence[float] | None = None,
) -> None:
    """Writes weights and description into an existing directory. `model` is the float model, or has `layers` installed.

    `timesteps` are the deployment's time arguments of the denoiser, step by step; None writes one row for each bin.
    Multipliers are never folded: the consumer takes its float tensors from the float model.

    Raises NumbersError when a number that would be written is not finite, UsageError for timesteps that are not.
    """
    weight_name, description_name = names or file_names(scheme_of(layers))
    levels = deployed_levels(layers, timesteps)
    named = all_names(layers, model)
    tensors, description = view(named, model, levels)
    text = json.dumps(description, indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_tensors(directory / weight_name, tensors, _metadata(named, levels), modes.data)
    with create(directory / description_name, modes.data) as sink:
        sink.write(text.encode())


def view(
    layers: Mapping[str, QuantizedLayer], model: nn.Module, levels: Sequence[float] = ()
) -> tuple[dict[str, Planned], dict[str, str]]:
    """The tensors of the checkpoint and its description, by name. `layers` are by all their names; `levels` has the
    noise level of each row."""
    tensors: dict[str, Planned] = {}
    description = {MODEL_TYPE: scheme_of(layers)}
    for name, layer in layers.items():
        inner = INNER if layer.mul_scale is not None else ""
        for key, tensor in layer_tensors(layer, levels):
            key = key if key == MUL_SCALE else inner + key
            tensors[f"{name}.{key}"] = tensor
            description[f"{name}.{key}"] = "FLOAT" if key in (MUL_SCALE, inner + "bias") else layer.scheme
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[0] not in layers and isinstance(tensor, Tensor):
            check_finite_tensor(name, tensor)
            page_out(tensor)  # until it is written
            tensors[name] = Planned.of(tensor)
            description[name] = "FLOAT"
    return tensors, description


def layer_tensors(layer: QuantizedLayer, levels: Sequence[float] = ()) -> Iterator[tuple[str, Planned]]:
    """Yields the tensors of one layer under Ascend's names; of a W8A8_TIMESTEP layer a row for each of `levels`."""
    outputs = layer.weight.shape[0]
    if layer.mul_scale is not None:
        yield MUL_SCALE, Planned.of(layer.mul_scale)
    yield "weight", Planned.of(layer.weight)
    yield "weight_scale", Planned.of(layer.weight_scale.view(outputs, 1))
    yield "weight_offset", Planned(torch.float32, (outputs, 1), partial(torch.zeros, outputs, 1))
    if layer.bias is not None:
        yield "bias", Planned.of(layer.bias)
    if not layer.calibrated:
        return
    scale, offset = layer.input_scale.view(-1), layer.input_zero_point.view(-1)
    deq, quant_bias = layer.deq, layer.quant_bias
    if layer.input_type.by_level:
        at = rows_of(layer.edges, levels).bins
        scale, offset, deq, quant_bias = scale[at].view(-1, 1), offset[at].view(-1, 1), deq[at], quant_bias[at]
    yield "input_scale", Planned.of(scale.to(layer.dtype))
    yield "input_offset", Planned.of(offset.to(layer.dtype))
    yield "deq_scale", Planned.of(deq if layer.dtype == torch.bfloat16 else packed(deq))
    yield "quant_bias", Planned.of(quant_bias)


def _metadata(layers: Mapping[str, QuantizedLayer], levels: Sequence[float]) -> dict[str, str]:
    found: dict[str, Any] = {
        GEOMETRY: {name: x.geometry._asdict() for name, x in layers.items() if isinstance(x, QuantizedConv2d)},
        LEVELS: levels,
        EDGES: {name: rows_of(x.edges, levels).edges.tolist() for name, x in layers.items() if x.input_type.by_level},
        CORRECTED: sorted(name for name, x in layers.items() if corrected(x)),
        MADE_BIASES: sorted(name for name, x in layers.items() if x.made_bias),
    }
    return {key: json.dumps(value, sort_keys=True) for key, value in found.items() if value}
