"""Writes the format `comfy`: one safetensors file for ComfyUI's quantization `int8_tensorwise`. The tensors have native
names, those that the model's authors use.

An integer matrix X has the tensors X.weight int8 (out, in), X.weight_scale float32 (out, 1), X.bias in the float
model's dtype, and X.comfy_quant. The last one holds the bytes of a JSON object, the marker, without which ComfyUI would
use the codes as float weights. The metadata of the file repeat all markers under `_quantization_metadata`.

Layers that are concatenated into one matrix, such as query, key and value, are written as integers if all of them are
integer layers with the same rotation. Otherwise the matrix is written in float, with the dequantized weights of its
integer layers. Their inputs then stay float, which only makes the output more accurate.
"""

import json
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from octavo.capture.errors import UsageError
from octavo.capture.files import Modes
from octavo.capture.paging import page_out
from octavo.capture.tensors import Planned, write_tensors

from ...layers.install import all_names
from ...layers.modules import QuantizedLayer, QuantizedLinear
from ...layers.schemes import DYNAMIC
from ...layers.transforms import Rotate, same_transform
from ...layers.weights import check_finite_tensor
from ..diffusers.write import NONE, state
from ..linears import dequantized
from .family import Family
from .names import Rows, family_of, native_names
from .structure import FILE, MARKER, METADATA, VERSION, marker_of

_log = logging.getLogger(__name__)
_LEAVES = ("weight", "bias")


class Source(NamedTuple):
    """A tensor of the model under its name in diffusers. `tensor` is the tensor of the float model. `layer` is the
    integer layer that replaces the float layer to which the tensor belongs; None if that layer stays float."""

    tensor: Planned
    layer: QuantizedLayer | None


def write_comfy(
    layers: Mapping[str, QuantizedLayer],
    model: nn.Module,
    directory: Path,
    modes: Modes,
    *,
    parameters: Mapping[str, Callable[[], Tensor]] = NONE,
) -> None:
    """Writes `model`, with the integer `layers` in place of its float layers, as one file into an existing directory.
    `modes` has the permissions of new files.

    `parameters` are the float parameters with smoothing factors folded in, a dict from name to a function that returns
    the new value. Raises UsageError for a layer or a model that the format cannot hold, NumbersError for a number to be
    written that is not finite.
    """
    for name, layer in layers.items():
        if refusal := refusal_of(layer):
            raise UsageError(f"format comfy: {name} {refusal}")
    tensors, markers = native_tensors(sources_of(layers, model, parameters), family_of(model))
    for owner, marker in markers.items():
        data = torch.tensor(list(json.dumps(marker).encode()), dtype=torch.uint8)
        tensors[f"{owner}.{MARKER}"] = Planned.of(data)
    for key, flag in family_of(model).flags.items():
        if getattr(model, "config", {}).get(key):
            tensors[flag] = Planned.of(torch.zeros(0))
    metadata = {METADATA: json.dumps({"format_version": VERSION, "layers": markers})}
    write_tensors(directory / FILE, tensors, metadata, modes.data)


def native_tensors(
    sources: Mapping[str, Source], family: Family
) -> tuple[dict[str, Planned], dict[str, dict[str, Any]]]:
    """Returns two dicts: from native name in `family` to tensor, without the markers; and from the name of each int8
    matrix to its marker, a dict that says how the matrix is quantized. `sources` is a dict from name in diffusers to
    tensor."""
    tensors: dict[str, Planned] = {}
    markers: dict[str, dict[str, Any]] = {}
    for native, rows in native_names(sources, family).items():
        parts = [sources[name] for name in rows.names]
        owner, _, leaf = native.rpartition(".")
        integers = [part.layer for part in parts if part.layer is not None]
        if leaf == "weight" and integers and _agree(integers, len(parts)):
            markers[owner] = marker_of(_group(integers[0]))
            tensors |= {f"{owner}.{key}": value for key, value in _integer_tensors(integers, rows).items()}
            continue
        if leaf == "weight" and integers:
            _log.warning("%s is written in float: its layers differ in rotation, or some are float", owner)
        tensors[native] = _joined([_float(native, part) for part in parts], rows)
    return tensors, markers


def refusal_of(layer: QuantizedLayer) -> str | None:
    """Returns the reason why the format `comfy` cannot hold a layer, and what the user can do; None if it can hold the
    layer."""
    if not isinstance(layer, QuantizedLinear):
        return "is a convolution, which ComfyUI does not load in int8. Keep the layer float."
    if layer.scheme != DYNAMIC:
        return f"is {layer.scheme}, but ComfyUI's int8 has a range for each token. Use --activations dynamic."
    return None


def sources_of(
    layers: Mapping[str, QuantizedLayer], model: nn.Module, parameters: Mapping[str, Callable[[], Tensor]]
) -> dict[str, Source]:
    """Returns a dict from name in diffusers to `Source`, in the order of the state dict of `model`. A tensor of one of
    the integer `layers` is listed only if it is the weight or the bias.

    `parameters` are the float parameters with smoothing factors folded in, a dict from name to a function that returns
    the new value.
    """
    named = all_names(layers, model)
    sources = {}
    for name, tensor in state(model, {}, parameters):
        owner, _, leaf = name.rpartition(".")
        layer = named.get(owner)
        if layer is None or leaf in _LEAVES:
            sources[name] = Source(tensor, layer)
    return sources


def _agree(integers: list[QuantizedLayer], parts: int) -> bool:
    """Returns whether layers that are concatenated can be written as one int8 matrix: whether all are integer layers
    with the same rotation. `parts` is the number of the layers, `integers` are those that are integer layers."""
    return len(integers) == parts and all(
        same_transform(layer.transform, integers[0].transform) for layer in integers[1:]
    )


def _group(layer: QuantizedLayer) -> int | None:
    """Returns the number of channels in a group of the layer's rotation; None without a rotation."""
    return layer.transform.size if isinstance(layer.transform, Rotate) else None


def _integer_tensors(integers: list[QuantizedLayer], rows: Rows) -> dict[str, Planned]:
    """Returns the tensors "weight" (codes) and "weight_scale" of the int8 matrix into which the weights of `integers`
    are concatenated. `rows` says whether halves of the rows are then exchanged."""
    weights = [Planned.of(layer.weight.detach()) for layer in integers]
    scales = [Planned.of(layer.weight_scale.view(-1, 1)) for layer in integers]
    return {"weight": _joined(weights, rows), "weight_scale": _joined(scales, rows)}


def _float(native: str, source: Source) -> Planned:
    """Returns the float tensor of `source`. If `source` belongs to an integer layer, that is the layer's dequantized
    weight or its bias; otherwise it is the tensor of the float model. `native` is the name that the tensor will have in
    the file."""
    layer = source.layer
    if layer is None:
        return source.tensor
    if native.endswith(".weight"):
        return Planned(layer.dtype, tuple(layer.weight.shape), partial(dequantized, layer))
    assert layer.bias is not None
    check_finite_tensor(native, layer.bias.detach())
    return Planned.of(layer.bias.detach())


def _joined(parts: list[Planned], rows: Rows) -> Planned:
    """Returns a `Planned` tensor, which is computed when it is written. It is what `join` returns for the tensors of
    `parts` and for `rows`."""
    if len(parts) == 1 and not rows.swapped and not rows.flat:
        return parts[0]
    shape = torch.Size((sum(part.shape[0] for part in parts), *parts[0].shape[1:]))
    return Planned(parts[0].dtype, (shape.numel(),) if rows.flat else tuple(shape), partial(_join, parts, rows))


def _join(parts: list[Planned], rows: Rows) -> Tensor:
    tensors = [part.make().detach() for part in parts]
    joined = join(tensors, rows)
    for tensor in tensors:
        page_out(tensor)
    return joined


def join(tensors: list[Tensor], rows: Rows) -> Tensor:
    """Returns `tensors` concatenated along the rows. If `rows.swapped` is True, the first and the second half of the
    rows are then exchanged. If `rows.flat` is True, the result is then flattened to one axis."""
    tensor = torch.cat(tensors)
    tensor = torch.cat(tensor.chunk(2)[::-1]) if rows.swapped else tensor
    return tensor.flatten() if rows.flat else tensor
