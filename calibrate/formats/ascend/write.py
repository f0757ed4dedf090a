"""Writes the format `ascend`, the layout that msModelSlim writes and MindIE-SD reads, with Ascend's tensor names.

A checkpoint is one safetensors file and a JSON description that gives the scheme of every tensor by name. The numbers
are those of the integer layers under other names; nothing is computed here. Layers of several schemes may be in one
file.

A W8A8_TIMESTEP layer has one row of numbers for each denoising step of the run that the checkpoint is for. The file's
metadata give the noise level of each row, and the noise levels that separate each layer's timestep bins, so that Octavo
can read the bins back. A layer X with a smoothing multiplier has the multiplier as X.div.mul_scale, and its other
tensors as X.linear.*.

A W8A8_MXFP8 layer has its weight in float8_e4m3fn, weight_scale in uint8 (out, in / 32), the exponents of powers of two
plus 127, and its bias in float32. It has no other tensors.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octavo.capture.files import Modes, create
from octavo.capture.paging import page_out
from octavo.capture.tensors import Planned, dtype_name, write_tensors

from ...attention.measure import AttentionRow
from ...layers.freeze import packed
from ...layers.install import all_names
from ...layers.modules import QuantizedConv2d, QuantizedLayer
from ...layers.weights import check_finite_tensor
from ..corrections import has_bias_correction
from .attention import attention_tensors
from .names import CORRECTED, DTYPE, EDGES, GEOMETRY, INNER, LEVELS, MADE_BIASES, MODEL_TYPE, MUL_SCALE, file_names
from .step_rows import deployed_levels, step_rows

NONE: Mapping[str, Callable[[], Tensor]] = {}  # for `parameters`: no float parameter has a new value
NO_ATTENTION: Mapping[str, AttentionRow] = {}  # for `attention`: all attention stays float


def scheme_of(layers: Mapping[str, QuantizedLayer]) -> str:
    """Returns the scheme that the checkpoint is named after: the scheme of the `layers` if all have the same one,
    otherwise W8A8."""
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
    attention: Mapping[str, AttentionRow] = NO_ATTENTION,
) -> None:
    """Writes the weight file and the description into an existing directory. `names` are the names of these two files;
    None stands for the names that MindIE-SD expects. `modes` has the permissions of new files.

    `model` is the float model, with or without `layers` in place of its float layers. `timesteps` are the noise levels
    of the denoising steps. The scales, zero points, deq and quant_bias of a W8A8_TIMESTEP layer get one row for each
    step. If `timesteps` is None or empty, they get a row for each timestep bin. Smoothing multipliers are written as
    tensors and never folded into float parameters, because MindIE-SD takes float parameters from the float model.
    `attention` is a dict from each attention module that is quantized to the row with its type and rotation.

    Raises NumbersError for a number to be written that is not finite, UsageError for timesteps that are not finite.
    """
    weight_name, description_name = names or file_names(scheme_of(layers))
    levels = deployed_levels(layers, timesteps)
    named = all_names(layers, model)
    tensors, description = tensors_and_description(named, model, levels)
    if attention:
        rotations, types = attention_tensors(attention, next(iter(layers.values())).dtype)
        tensors, description = tensors | rotations, description | types
    text = json.dumps(description, indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_tensors(directory / weight_name, tensors, _metadata(named, levels), modes.data)
    with create(directory / description_name, modes.data) as sink:
        sink.write(text.encode())


def tensors_and_description(
    layers: Mapping[str, QuantizedLayer],
    model: nn.Module,
    levels: Sequence[float] = (),
    parameters: Mapping[str, Callable[[], Tensor]] = NONE,
) -> tuple[dict[str, Planned], dict[str, str]]:
    """Returns two dicts with the names of the tensors as keys: the tensors to be written, and the description, which
    has each tensor's scheme or "FLOAT".

    `layers` is a dict from name to integer layer; a layer that is used in several places is in it under each of its
    names. `levels` are the noise levels for which each W8A8_TIMESTEP layer gets a row of scales, zero points, deq and
    quant_bias. `parameters` are the float parameters with smoothing factors folded in, a dict from name to a function
    that returns the new value.
    """
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
            planned = Planned.of(tensor)
            planned = planned._replace(make=parameters.get(name, planned.make))
            check_finite_tensor(name, planned.make())
            page_out(tensor)  # frees the memory until the tensor is written
            tensors[name], description[name] = planned, "FLOAT"
    return tensors, description


def layer_tensors(layer: QuantizedLayer, levels: Sequence[float] = ()) -> Iterator[tuple[str, Planned]]:
    """Yields (name, tensor) for each tensor of one layer. The name is Ascend's, without the name of the layer, such as
    "deq_scale". The input scales, zero points, deq and quant_bias of a W8A8_TIMESTEP layer have a row for each of
    `levels`, the noise levels of the denoising steps."""
    outputs = layer.weight.shape[0]
    if layer.mul_scale is not None:
        yield MUL_SCALE, Planned.of(layer.mul_scale)
    yield "weight", Planned.of(layer.weight)
    if layer.input_scheme.block is not None:
        yield "weight_scale", Planned.of(layer.weight_scale)
        if layer.bias is not None:
            yield "bias", Planned(torch.float32, (outputs,), layer.bias.float)
        return
    yield "weight_scale", Planned.of(layer.weight_scale.view(outputs, 1))
    yield "weight_offset", Planned(torch.float32, (outputs, 1), partial(torch.zeros, outputs, 1))
    if layer.bias is not None:
        yield "bias", Planned.of(layer.bias)
    if not layer.calibrated:
        return
    scale, offset = layer.input_scale.view(-1), layer.input_zero_point.view(-1)
    deq, quant_bias = layer.deq, layer.quant_bias
    if layer.input_type.by_level:
        bins = step_rows(layer.edges, levels).bins
        scale, offset, deq, quant_bias = scale[bins].view(-1, 1), offset[bins].view(-1, 1), deq[bins], quant_bias[bins]
    yield "input_scale", Planned.of(scale.to(layer.dtype))
    yield "input_offset", Planned.of(offset.to(layer.dtype))
    yield "deq_scale", Planned.of(deq if layer.dtype == torch.bfloat16 else packed(deq))
    yield "quant_bias", Planned.of(quant_bias)


def _metadata(layers: Mapping[str, QuantizedLayer], levels: Sequence[float]) -> dict[str, str]:
    values: dict[str, Any] = {
        GEOMETRY: {name: x.geometry._asdict() for name, x in layers.items() if isinstance(x, QuantizedConv2d)},
        LEVELS: levels,
        EDGES: {name: step_rows(x.edges, levels).edges.tolist() for name, x in layers.items() if x.input_type.by_level},
        CORRECTED: sorted(name for name, x in layers.items() if has_bias_correction(x)),
        DTYPE: next((dtype_name(x.dtype) for x in layers.values() if x.input_scheme.block is not None), ""),
        MADE_BIASES: sorted(name for name, x in layers.items() if x.made_bias),
    }
    return {key: json.dumps(value, sort_keys=True) for key, value in values.items() if value}
