"""Reads the layers of an ascend checkpoint, and checks every number against what an export writes."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.capture.errors import FileError, OctavoError

from ...layers.freeze import unpacked
from ...layers.inputs import INPUTS, FloatInput, Input, StaticInput, TimestepInput
from ...layers.modules import QuantizedConv2d, QuantizedLayer, QuantizedLinear
from ...layers.noise_level import bins_of
from ...layers.numbers import Numbers
from ...layers.scheme import STORABLE, QParams
from ...layers.transforms import Multiply
from .checkpoint import Checkpoint
from .write import MUL_SCALE


class LayerPlace(NamedTuple):
    """A layer's place in a checkpoint."""

    checkpoint: Checkpoint
    name: str

    def read(self, key: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...] | None = None) -> Tensor:
        """Reads one tensor of the layer by the last part of its name."""
        return self.checkpoint.read(self.checkpoint.prefix(self.name) + key, dtypes, shape)

    def wrong(self, key: str, fact: str) -> OctavoError:
        """The error to raise for a fault of one of the layer's tensors."""
        path = self.checkpoint.weight_path
        return FileError(f"{path}: {self.name}.{key} {fact}. Write the checkpoint anew.")

    def positive(self, key: str, tensor: Tensor) -> Tensor:
        """Returns the tensor. Raises FileError unless all its values are finite and above zero."""
        if not bool(((tensor > 0) & tensor.isfinite()).all()):
            raise self.wrong(key, "is not positive and finite")
        return tensor


def read_layer(checkpoint: Checkpoint, name: str) -> QuantizedLayer:
    """Reads the layer `name`. Raises FileError for numbers that no export writes."""
    place, kind = LayerPlace(checkpoint, name), INPUTS[checkpoint.schemes[name]]
    weight = place.read("weight", (torch.int8,))
    if weight.ndim not in (2, 4) or not weight.numel():
        raise place.wrong("weight", f"has shape {tuple(weight.shape)}")
    if int(weight.min()) < -127:
        raise place.wrong("weight", "holds -128")
    outputs = weight.shape[0]
    scale = place.read("weight_scale", (torch.float32,), (outputs, 1)).view(outputs)
    place.positive("weight_scale", scale)
    bias = _bias(place, outputs)
    geometry = checkpoint.geometry(name) if weight.ndim == 4 else None
    groups = geometry.groups if geometry else 1
    if outputs % groups:
        raise place.wrong("weight", f"has {outputs} outputs in {groups} groups")
    multiplier = _multiplier(place, weight.shape[1] * groups)
    known = [tensor.dtype for tensor in (multiplier, bias) if tensor is not None]
    dtype = known[0] if known else torch.float32
    transform = None if multiplier is None else Multiply(multiplier)
    numbers = Numbers(weight, scale, bias, FloatInput(), dtype, transform, made_bias=checkpoint.made_bias(name))
    if kind.ranged:
        ranged = _ranges(place, weight, kind)
        numbers = replace(numbers, input=ranged.input, deq=ranged.deq, quant_bias=ranged.quant_bias, dtype=ranged.dtype)
        if multiplier is not None and multiplier.dtype != ranged.dtype:
            raise place.wrong(MUL_SCALE, f"is {multiplier.dtype}, input_scale {ranged.dtype}")
    elif kind.rounded:
        numbers = replace(numbers, input=kind())
        _check_accumulator(place, "weight", torch.zeros(1), weight, 127)
    return QuantizedLinear(numbers) if geometry is None else QuantizedConv2d(numbers, geometry)


def _bias(place: LayerPlace, outputs: int) -> Tensor | None:
    if place.checkpoint.prefix(place.name) + "bias" not in place.checkpoint.tensors:
        return None
    bias = place.read("bias", STORABLE, (outputs,))
    if not bool(bias.isfinite().all()):
        raise place.wrong("bias", "is not finite")
    return bias


def _multiplier(place: LayerPlace, inputs: int) -> Tensor | None:
    key = f"{place.name}.{MUL_SCALE}"
    if key not in place.checkpoint.tensors:
        return None
    return place.positive(MUL_SCALE, place.checkpoint.read(key, STORABLE, (inputs,)))


class Ranges(NamedTuple):
    """The numbers of a layer whose ranges are stored, and the dtype of its float form."""

    input: StaticInput | TimestepInput
    deq: Tensor
    quant_bias: Tensor
    dtype: torch.dtype


def _ranges(place: LayerPlace, weight: Tensor, kind: type[Input]) -> Ranges:
    levels = place.checkpoint.levels
    if kind.by_level and not levels:
        raise place.wrong("input_scale", "has rows for noise levels that are not known")
    leading = (len(levels),) if kind.by_level else ()
    scale = place.positive("input_scale", place.read("input_scale", STORABLE, (*leading, 1)))
    offset = place.read("input_offset", (scale.dtype,), (*leading, 1)).float()
    whole = (offset >= -128) & (offset <= 127) & (offset == offset.round())
    if not bool(whole.all()):
        raise place.wrong("input_offset", f"is {float(offset[~whole][0])}")
    deq = _deq(place, scale.dtype, (*leading, weight.shape[0]))
    quant_bias = place.read("quant_bias", (torch.int32,), (*leading, weight.shape[0]))
    _check_accumulator(place, "quant_bias", quant_bias, weight, 128)
    qparams = QParams(scale.float().squeeze(-1), offset.to(torch.int32).squeeze(-1))
    found = Ranges(StaticInput(qparams), deq, quant_bias, scale.dtype)
    return _bins(place, found, qparams, levels) if kind.by_level else found


def _deq(place: LayerPlace, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if dtype == torch.bfloat16:
        return place.positive("deq_scale", place.read("deq_scale", (torch.float32,), shape))
    bits = place.read("deq_scale", (torch.int64,), shape)
    if bool(((bits < 0) | (bits >> 31 != 0)).any()):
        raise place.wrong("deq_scale", "is not the bits of positive float32 numbers")
    return place.positive("deq_scale", unpacked(bits))


def _check_accumulator(place: LayerPlace, key: str, quant_bias: Tensor, weight: Tensor, largest: int) -> None:
    if int(quant_bias.long().abs().max()) + largest * 127 * weight[0].numel() >= 2**31:
        raise place.wrong(key, "could overflow int32 in the accumulator")


def _bins(place: LayerPlace, rows: Ranges, qparams: QParams, levels: tuple[float, ...]) -> Ranges:
    """The numbers of each bin, from the rows of the denoising steps, which have to agree within a bin."""
    edges = place.checkpoint.edges(place.name)
    bins = bins_of(torch.tensor(levels), edges).tolist()
    missing = set(range(len(edges) + 1)) - set(bins)
    if missing:
        raise place.wrong("input_scale", f"has no row for bin {min(missing)} of its noise levels")
    first = torch.tensor([bins.index(number) for number in range(len(edges) + 1)])
    tensors = (*qparams, rows.deq, rows.quant_bias)
    scale, zero_point, deq, quant_bias = (tensor[first] for tensor in tensors)
    for kept, tensor in zip((scale, zero_point, deq, quant_bias), tensors, strict=True):
        if not torch.equal(kept[bins], tensor):
            raise place.wrong("input_scale", "and the like have rows that differ in one bin of noise levels")
    return Ranges(TimestepInput(QParams(scale, zero_point), edges), deq, quant_bias, rows.dtype)


def load_ascend(directory: Path | str) -> dict[str, QuantizedLayer]:
    """Reads the quantized layers of a checkpoint by name, with the very integers that were exported.

    Raises FileError for files that are missing, damaged, or hold numbers that no export writes.
    """
    checkpoint = Checkpoint(directory)
    return {name: read_layer(checkpoint, name) for name in checkpoint.layer_names}
