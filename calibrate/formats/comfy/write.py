"""Writes the format `comfy`: one safetensors file for ComfyUI's quantizations `int8_tensorwise`, `float8_e4m3fn` and
`mxfp8`. The tensors have native names, those that the model's authors use.

An integer matrix X has the tensors X.weight int8 (out, in), X.weight_scale float32 (out, 1), X.bias in the float
model's dtype, and X.comfy_quant. The last one holds the bytes of a JSON object, the marker, without which ComfyUI would
use the codes as float weights. The metadata of the file repeat all markers under `_quantization_metadata`.

A matrix in FP8 has X.weight float8_e4m3fn, and X.weight_scale and X.input_scale float32 (). X.input_scale must be
there: without it ComfyUI takes 1, and cuts inputs off at 448. A matrix in MXFP8 has X.weight float8_e4m3fn, filled up
with rows of zeros to a multiple of 32, and X.weight_scale uint8 in the order that `swizzled` makes.

Layers that are concatenated into one matrix, such as query, key and value, are written in 8 bits if all of them are
layers of one scheme with the same rotation and, in FP8, equal scales. Otherwise the matrix is written in float, with
the dequantized weights of its 8-bit layers. Their inputs then stay float, which only makes the output more accurate.
"""

import json
import logging
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.capture.errors import UsageError
from octavo.capture.files import Modes
from octavo.capture.paging import page_out
from octavo.capture.tensors import Planned, write_tensors

from ...layers.install import all_names
from ...layers.modules import QuantizedLayer, QuantizedLinear
from ...layers.schemes import DYNAMIC, FP8_STATIC
from ...layers.schemes import MXFP8 as MXFP8_DYNAMIC
from ...layers.transforms import Rotate, same_transform
from ...layers.weights import check_finite_tensor
from ..diffusers.write import NONE, state
from ..linears import dequantized
from .attention import attention_tensors
from .family import Family
from .names import Rows, family_of, native_names
from .structure import FP8, INT8, MARKER, METADATA, MXFP8, VERSION, file_for, marker_of

_log = logging.getLogger(__name__)
_LEAVES = ("weight", "bias")
KINDS = {DYNAMIC: INT8, FP8_STATIC: FP8, MXFP8_DYNAMIC: MXFP8}  # from a scheme to ComfyUI's name of the format
_ROWS = 32  # ComfyUI fills a weight in MXFP8 up to a multiple of so many rows


class Source(NamedTuple):
    """A tensor of the model, to be written. `tensor` is the tensor of the float model. `layer` is the integer layer
    that replaces the float layer to which the tensor belongs; None if that layer stays float."""

    tensor: Planned
    layer: QuantizedLayer | None


def write_comfy(
    layers: Mapping[str, QuantizedLayer],
    model: nn.Module,
    directory: Path,
    modes: Modes,
    *,
    parameters: Mapping[str, Callable[[], Tensor]] = NONE,
    attention: Collection[str] = (),
) -> None:
    """Writes `model`, with the integer `layers` in place of its float layers, as one file into an existing directory.
    `modes` has the permissions of new files.

    `parameters` are the float parameters with smoothing factors folded in, a dict from name to a function that returns
    the new value. `attention` are the names of the attention modules that are quantized. Raises UsageError for a layer
    or a model that the format cannot hold, NumbersError for a number to be written that is not finite.
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
    tensors |= attention_tensors(attention, model)[0]
    metadata = {METADATA: json.dumps({"format_version": VERSION, "layers": markers})}
    name = file_for({marker["format"] for marker in markers.values()})
    write_tensors(directory / name, tensors, metadata, modes.data)


def native_tensors(
    sources: Mapping[str, Source], family: Family
) -> tuple[dict[str, Planned], dict[str, dict[str, Any]]]:
    """Returns two dicts: from native name in `family` to tensor, without the markers; and from the name of each 8-bit
    matrix to its marker, a dict that says how the matrix is quantized. `sources` is a dict from name in diffusers to
    tensor."""
    tensors: dict[str, Planned] = {}
    markers: dict[str, dict[str, Any]] = {}
    for native, rows in native_names(sources, family).items():
        parts = [sources[name] for name in rows.names]
        owner, _, leaf = native.rpartition(".")
        integers = [part.layer for part in parts if part.layer is not None]
        if leaf == "weight" and integers and _agree(integers, len(parts)):
            markers[owner] = marker_of(KINDS[integers[0].scheme], _group(integers[0]))
            tensors |= {f"{owner}.{key}": value for key, value in _code_tensors(integers, rows).items()}
            continue
        if leaf == "weight" and integers:
            _log.warning(
                "%s is written in float: the layers joined in it differ in rotation or scale, or some are float", owner
            )
        tensors[native] = _joined([_float(native, part) for part in parts], rows)
    return tensors, markers


def refusal_of(layer: QuantizedLayer) -> str | None:
    """Returns the reason why the format `comfy` cannot hold a layer, and what the user can do; None if it can hold the
    layer."""
    if not isinstance(layer, QuantizedLinear):
        return "is a convolution, which ComfyUI does not load in 8 bits. Keep the layer float."
    if layer.scheme not in KINDS:
        if layer.integer:
            return f"is {layer.scheme}, but ComfyUI's int8 has a range for each token. Use --activations dynamic."
        return f"is {layer.scheme}, but ComfyUI's FP8 has one range for all inputs. Use --activations static."
    if layer.scheme == FP8_STATIC and not _one_scale([layer]):
        return "has a scale for each output, but ComfyUI takes one for a weight in FP8. Use --weight-scales tensor."
    return None


def sources_of(
    layers: Mapping[str, QuantizedLayer], model: nn.Module, parameters: Mapping[str, Callable[[], Tensor]]
) -> dict[str, Source]:
    """Returns a dict from the name of a tensor in diffusers to its `Source`, which holds the tensor and the integer
    layer that it belongs to, if any. The dict is in the order of the state dict of `model`. A tensor of one of the
    integer `layers` is listed only if it is the weight or the bias.

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


def _agree(layers: list[QuantizedLayer], parts: int) -> bool:
    """Returns whether layers that are concatenated can be written as one 8-bit matrix. They can if all are 8-bit layers
    of one scheme with the same rotation, and in FP8 with the same scales. `parts` is the number of all layers to
    concatenate; `layers` has only the 8-bit ones among them."""
    first = layers[0]
    alike = len(layers) == parts and all(
        layer.scheme == first.scheme and same_transform(layer.transform, first.transform) for layer in layers[1:]
    )
    return alike and (first.scheme != FP8_STATIC or _one_scale(layers))


def _one_scale(layers: list[QuantizedLayer]) -> bool:
    """Returns whether all output channels of static FP8 `layers` have the same weight scale, and all inputs the same
    scale."""
    first = layers[0]
    return all(
        bool((layer.weight_scale == first.weight_scale[0]).all()) and torch.equal(layer.input_scale, first.input_scale)
        for layer in layers
    )


def _group(layer: QuantizedLayer) -> int | None:
    """Returns the number of channels in a group of the layer's rotation; None without a rotation."""
    return layer.transform.size if isinstance(layer.transform, Rotate) else None


def _code_tensors(layers: list[QuantizedLayer], rows: Rows) -> dict[str, Planned]:
    """Returns the tensors, by the last part of their names, of the 8-bit matrix into which the weights of `layers` are
    concatenated, except the bias. `rows` says whether the first and the second half of the matrix's rows are then
    exchanged, because ComfyUI's model has them in the other order."""
    weight = _joined([Planned.of(layer.weight.detach()) for layer in layers], rows)
    kind = KINDS[layers[0].scheme]
    if kind == FP8:
        scales = {"weight_scale": layers[0].weight_scale[0].clone(), "input_scale": layers[0].input_scale}
        return {"weight": weight} | {name: Planned.of(scale) for name, scale in scales.items()}
    scale = _joined([Planned.of(layer.weight_scale.view(len(layer.weight), -1)) for layer in layers], rows)
    if kind == INT8:
        return {"weight": weight, "weight_scale": scale}
    count, width = weight.shape
    filled = Planned(weight.dtype, (count + -count % _ROWS, width), partial(_filled, weight))
    shape = (count + -count % 128, scale.shape[1] + -scale.shape[1] % 4)
    return {"weight": filled, "weight_scale": Planned(scale.dtype, shape, lambda: swizzled(scale.make()))}


def _filled(weight: Planned) -> Tensor:
    """Returns FP8 codes (rows, in), filled up with zeros to a multiple of 32 rows."""
    codes = weight.make()
    bits = F.pad(codes.view(torch.uint8), (0, 0, 0, -len(codes) % _ROWS))  # pad knows no float8
    return bits.view(codes.dtype)


def swizzled(scales: Tensor) -> Tensor:
    """Returns the scales of blocks (rows, blocks) in the order in which NVIDIA's cuBLAS reads them ("1D Block Scaling
    Factors Layout" in its documentation). Zeros fill the matrix up to multiples of 128 rows and 4 blocks, and the
    result has the shape of the filled matrix.

    The matrix is cut into tiles of 128 rows and 4 blocks, which follow one another in memory. In a tile, the four
    scales of row r are followed by those of the rows r + 32, r + 64 and r + 96.
    """
    filled = F.pad(scales, (0, -scales.shape[1] % 4, 0, -len(scales) % 128))
    tiles = filled.unflatten(1, (-1, 4)).unflatten(0, (-1, 4, 32))  # (tile, quarter, row in the quarter, tile, block)
    return tiles.permute(0, 3, 2, 1, 4).reshape(filled.shape)


def _float(native: str, source: Source) -> Planned:
    """Returns `source` as a float tensor. If `source` belongs to an integer layer, this is the layer's dequantized
    weight or its bias; otherwise it is the tensor of the float model. `native`, the name that the tensor will have in
    the file, says whether it is a weight."""
    layer = source.layer
    if layer is None:
        return source.tensor
    if native.endswith(".weight"):
        return Planned(layer.dtype, tuple(layer.weight.shape), partial(dequantized, layer))
    assert layer.bias is not None
    check_finite_tensor(native, layer.bias.detach())
    return Planned.of(layer.bias.detach())


def _joined(parts: list[Planned], rows: Rows) -> Planned:
    """Returns a `Planned` tensor, which is computed when it is written: `parts`, concatenated along the rows. If
    `rows.swapped` is True, the first and the second half of the rows are then exchanged. If `rows.flat` is True, the
    result is then flattened to one axis."""
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
