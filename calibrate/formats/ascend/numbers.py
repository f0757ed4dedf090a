"""Reads the numbers of an ascend checkpoint's layers, and checks each of them against what an export writes.

Importing this module needs no torch.
"""

from typing import NamedTuple

import numpy as np

from octavo.capture.arrays import Array
from octavo.capture.errors import FileError, OctavoError

from ...layers.schemes import DYNAMIC, RANGED, TIMESTEP
from ..integers import Integers
from .checkpoint import FLOATS, Checkpoint, Convolution
from .names import MUL_SCALE


class Floats(NamedTuple):
    """Numbers of a float tensor in float32, and the dtype that they have in the file."""

    values: Array
    dtype: str


class LayerNumbers(NamedTuple):
    """The numbers of a layer: `bias` is that of `integers` with its dtype, `dtype` that of the float layer, `edges` lie
    between the bins of a W8A8_TIMESTEP layer."""

    integers: Integers
    dtype: str
    bias: Floats | None
    multiplier: Floats | None
    edges: Array | None
    convolution: Convolution | None


class LayerPlace(NamedTuple):
    """A layer's place in a checkpoint."""

    checkpoint: Checkpoint
    name: str

    def read(self, key: str, dtypes: tuple[str, ...], shape: tuple[int, ...] | None = None) -> Array:
        """Reads one tensor of the layer by the last part of its name."""
        return self.checkpoint.read(self.checkpoint.prefix(self.name) + key, dtypes, shape)

    def floats(self, key: str, shape: tuple[int, ...], dtypes: tuple[str, ...] = FLOATS) -> Floats:
        """Reads one float tensor of the layer by the last part of its name."""
        return _floats(self.checkpoint, self.checkpoint.prefix(self.name) + key, shape, dtypes)

    def wrong(self, key: str, fact: str) -> OctavoError:
        """The error to raise for a fault of one of the layer's tensors."""
        path = self.checkpoint.weight_path
        return FileError(f"{path}: {self.name}.{key} {fact}. Write the checkpoint anew.")

    def positive(self, key: str, values: Array) -> Array:
        """Returns the values. Raises FileError unless all are finite and above zero."""
        if not bool(((values > 0) & np.isfinite(values)).all()):
            raise self.wrong(key, "is not positive and finite")
        return values


@np.errstate(invalid="ignore")  # damaged numbers
def read_numbers(checkpoint: Checkpoint, name: str) -> LayerNumbers:
    """Reads the numbers of the layer `name`. Raises FileError for numbers that no export writes."""
    place, scheme = LayerPlace(checkpoint, name), checkpoint.schemes[name]
    weight = place.read("weight", ("int8",))
    if weight.ndim not in (2, 4) or not weight.size:
        raise place.wrong("weight", f"has shape {weight.shape}")
    if int(weight.min()) < -127:
        raise place.wrong("weight", "holds -128")
    outputs = len(weight)
    scale = place.read("weight_scale", ("float32",), (outputs, 1)).reshape(outputs)
    place.positive("weight_scale", scale)
    bias = _bias(place, outputs)
    convolution = checkpoint.convolution(name) if weight.ndim == 4 else None
    groups = convolution.groups if convolution else 1
    if outputs % groups:
        raise place.wrong("weight", f"has {outputs} outputs in {groups} groups")
    multiplier = _multiplier(place, weight.shape[1] * groups)
    known = [each.dtype for each in (multiplier, bias) if each is not None]
    integers = Integers(scheme, weight, scale, None if bias is None else bias.values)
    found = LayerNumbers(integers, known[0] if known else "float32", bias, multiplier, None, convolution)
    if scheme in RANGED:
        found = _ranged(place, found)
        if multiplier is not None and multiplier.dtype != found.dtype:
            raise place.wrong(MUL_SCALE, f"is torch.{multiplier.dtype}, input_scale torch.{found.dtype}")
    elif scheme == DYNAMIC:
        _check_accumulator(place, "weight", np.zeros(1, np.int32), weight, 127)
    return found


def _floats(checkpoint: Checkpoint, key: str, shape: tuple[int, ...], dtypes: tuple[str, ...] = FLOATS) -> Floats:
    values = checkpoint.read(key, dtypes, shape).astype(np.float32, copy=False)
    return Floats(values, checkpoint.tensors[key].dtype)


def _bias(place: LayerPlace, outputs: int) -> Floats | None:
    if place.checkpoint.prefix(place.name) + "bias" not in place.checkpoint.tensors:
        return None
    bias = place.floats("bias", (outputs,))
    if not bool(np.isfinite(bias.values).all()):
        raise place.wrong("bias", "is not finite")
    return bias


def _multiplier(place: LayerPlace, inputs: int) -> Floats | None:
    key = f"{place.name}.{MUL_SCALE}"
    if key not in place.checkpoint.tensors:
        return None
    multiplier = _floats(place.checkpoint, key, (inputs,))
    place.positive(MUL_SCALE, multiplier.values)
    return multiplier


def _ranged(place: LayerPlace, layer: LayerNumbers) -> LayerNumbers:
    """The numbers of a layer with its ranges, and what follows from them."""
    integers, levels = layer.integers, place.checkpoint.levels
    by_level, weight = integers.scheme == TIMESTEP, integers.weight
    if by_level and not levels:
        raise place.wrong("input_scale", "has rows for noise levels that are not known")
    leading = (len(levels),) if by_level else ()
    scale, dtype = place.floats("input_scale", (*leading, 1))
    place.positive("input_scale", scale)
    offset = place.floats("input_offset", (*leading, 1), (dtype,)).values
    whole = (offset >= -128) & (offset <= 127) & (offset == np.rint(offset))
    if not bool(whole.all()):
        raise place.wrong("input_offset", f"is {float(offset[~whole][0])}")
    deq = _deq(place, dtype, (*leading, len(weight)))
    quant_bias = place.read("quant_bias", ("int32",), (*leading, len(weight)))
    _check_accumulator(place, "quant_bias", quant_bias, weight, 128)
    scale, zero_point = scale.reshape(leading), offset.astype(np.int32).reshape(leading)
    found = integers._replace(input_scale=scale, zero_point=zero_point, deq=deq, quant_bias=quant_bias)
    layer = layer._replace(integers=found, dtype=dtype)
    return _binned(place, layer, levels) if by_level else layer


def _deq(place: LayerPlace, dtype: str, shape: tuple[int, ...]) -> Array:
    if dtype == "bfloat16":
        return place.positive("deq_scale", place.read("deq_scale", ("float32",), shape))
    bits = place.read("deq_scale", ("int64",), shape)
    if bool(((bits < 0) | (bits >> 31 != 0)).any()):
        raise place.wrong("deq_scale", "is not the bits of positive float32 numbers")
    return place.positive("deq_scale", bits.astype(np.int32).view(np.float32))


def _check_accumulator(place: LayerPlace, key: str, quant_bias: Array, weight: Array, largest: int) -> None:
    if int(np.abs(quant_bias.astype(np.int64)).max()) + largest * 127 * weight[0].size >= 2**31:
        raise place.wrong(key, "could leave int32 in the accumulator")


def _binned(place: LayerPlace, layer: LayerNumbers, levels: tuple[float, ...]) -> LayerNumbers:
    """The numbers of each bin, from the rows of the denoising steps, which have to agree within a bin."""
    edges, integers = place.checkpoint.edges(place.name), layer.integers
    bins = np.searchsorted(edges, np.array(levels, np.float32), side="right").tolist()  # as `noise_level.bins_of`
    missing = set(range(len(edges) + 1)) - set(bins)
    if missing:
        raise place.wrong("input_scale", f"has no row for bin {min(missing)} of its noise levels")
    first = [bins.index(number) for number in range(len(edges) + 1)]
    kept = {}
    for key in ("input_scale", "zero_point", "deq", "quant_bias"):
        rows = getattr(integers, key)
        kept[key] = rows[first]
        if not np.array_equal(kept[key][bins], rows):
            raise place.wrong("input_scale", "and the like have rows that differ in one bin of noise levels")
    return layer._replace(integers=integers._replace(**kept), edges=edges)
