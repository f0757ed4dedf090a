"""Reads the weight codes, scales, biases and other numbers of an ascend checkpoint's integer layers, and refuses
numbers that no export writes, such as a negative scale.

Importing this module needs no torch.
"""

from typing import NamedTuple

import numpy as np

from octavo.capture.arrays import Array
from octavo.capture.errors import FileError, OctavoError

from ...layers.schemes import BLOCK, DYNAMIC, MXFP8, RANGED, TIMESTEP
from ..e4m3 import is_nan
from ..integers import Integers
from .checkpoint import FLOATS, Checkpoint, Convolution
from .names import MUL_SCALE

_LARGEST_BYTE = 254  # the largest stored scale of a block, 2**127 with 127 added to the exponent; 255 stands for NaN


class Floats(NamedTuple):
    """The values of a float tensor in float32, and the dtype that the tensor has in the file."""

    values: Array
    dtype: str


class LayerNumbers(NamedTuple):
    """The numbers of an integer layer in an ascend checkpoint.

    | field       | meaning                                                                                         |
    |-------------|-------------------------------------------------------------------------------------------------|
    | integers    | weight, scales, zero points, deq, quant_bias and bias                                           |
    | dtype       | dtype of the float layer                                                                        |
    | bias        | the bias of `integers` with its dtype in the file; None without one                             |
    | multiplier  | the smoothing multiplier; None without one                                                      |
    | edges       | noise levels that separate the bins of a W8A8_TIMESTEP layer; None for other layers             |
    | convolution | stride, padding, dilation and groups of a convolution; None for a linear                        |
    """

    integers: Integers
    dtype: str
    bias: Floats | None
    multiplier: Floats | None
    edges: Array | None
    convolution: Convolution | None


class LayerReader(NamedTuple):
    """Reads the tensors of the layer `name` from `checkpoint`. The FileErrors that its methods raise name the
    tensor."""

    checkpoint: Checkpoint
    name: str

    def read(self, key: str, dtypes: tuple[str, ...], shape: tuple[int, ...] | None = None) -> Array:
        """Returns the values of the layer's tensor `key`, the last part of the tensor's name, such as "weight". Raises
        FileError if the tensor is missing, if its dtype is not in `dtypes`, or if its shape is not `shape`; None allows
        any shape."""
        return self.checkpoint.read(self.checkpoint.prefix(self.name) + key, dtypes, shape)

    def floats(self, key: str, shape: tuple[int, ...], dtypes: tuple[str, ...] = FLOATS) -> Floats:
        """Returns the values in float32 and the stored dtype of the layer's float tensor `key`, the last part of the
        tensor's name, such as "bias". Raises FileError if the tensor is missing, if its dtype is not in `dtypes`, or if
        its shape is not `shape`."""
        return _floats(self.checkpoint, self.checkpoint.prefix(self.name) + key, shape, dtypes)

    def fault(self, key: str, fact: str) -> OctavoError:
        """Returns a FileError that says that the layer's tensor `key` has a fault, which `fact` describes."""
        path = self.checkpoint.weight_path
        return FileError(f"{path}: {self.name}.{key} {fact}. Copy the checkpoint again, or calibrate again.")

    def positive(self, key: str, values: Array) -> Array:
        """Returns `values`, the values of the layer's tensor `key`. Raises FileError unless all are finite and above
        zero."""
        if not bool(((values > 0) & np.isfinite(values)).all()):
            raise self.fault(key, "is not positive and finite")
        return values


@np.errstate(invalid="ignore")  # damaged numbers
def read_numbers(checkpoint: Checkpoint, name: str) -> LayerNumbers:
    """Reads the weight codes, scales, zero points, biases and other numbers of the integer layer `name`. Raises
    FileError for numbers that no export writes, such as a negative scale."""
    reader, scheme = LayerReader(checkpoint, name), checkpoint.schemes[name]
    if scheme == MXFP8:
        return _with_blocks(reader)
    weight = reader.read("weight", ("int8",))
    if weight.ndim not in (2, 4) or not weight.size:
        raise reader.fault("weight", f"has shape {weight.shape}")
    if int(weight.min()) < -127:
        raise reader.fault("weight", "holds -128")
    outputs = len(weight)
    scale = reader.read("weight_scale", ("float32",), (outputs, 1)).reshape(outputs)
    reader.positive("weight_scale", scale)
    bias = _bias(reader, outputs)
    convolution = checkpoint.convolution(name) if weight.ndim == 4 else None
    groups = convolution.groups if convolution else 1
    if outputs % groups:
        raise reader.fault("weight", f"has {outputs} outputs in {groups} groups")
    multiplier = _multiplier(reader, weight.shape[1] * groups)
    dtypes = [floats.dtype for floats in (multiplier, bias) if floats is not None]
    integers = Integers(scheme, weight, scale, None if bias is None else bias.values)
    layer = LayerNumbers(integers, dtypes[0] if dtypes else "float32", bias, multiplier, None, convolution)
    if scheme in RANGED:
        layer = _ranged(reader, layer)
        if multiplier is not None and multiplier.dtype != layer.dtype:
            raise reader.fault(
                MUL_SCALE, f"is torch.{multiplier.dtype}, but has to be torch.{layer.dtype}, the dtype of input_scale"
            )
    elif scheme == DYNAMIC:
        _check_accumulator(reader, "weight", np.zeros(1, np.int32), weight, 127)
    return layer


def _with_blocks(reader: LayerReader) -> LayerNumbers:
    """Reads the numbers of a W8A8_MXFP8 layer, which is a linear layer, with `reader`."""
    weight = reader.read("weight", ("float8_e4m3fn",))
    if weight.ndim != 2 or not weight.size or weight.shape[1] % BLOCK:
        raise reader.fault("weight", f"has shape {weight.shape}")
    if bool(is_nan(weight).any()):
        raise reader.fault("weight", "holds NaN")
    outputs, inputs = weight.shape
    scale = reader.read("weight_scale", ("uint8",), (outputs, inputs // BLOCK))
    if int(scale.max()) > _LARGEST_BYTE:
        raise reader.fault("weight_scale", f"holds {scale.max()}, but the largest valid number is {_LARGEST_BYTE}")
    bias, multiplier = _bias(reader, outputs), _multiplier(reader, inputs)
    dtypes = [floats.dtype for floats in (multiplier, bias) if floats is not None]
    dtype = reader.checkpoint.float_dtype or (dtypes[0] if dtypes else "float32")
    integers = Integers(MXFP8, weight, scale, None if bias is None else bias.values)
    return LayerNumbers(integers, dtype, bias, multiplier, None, None)


def _floats(checkpoint: Checkpoint, key: str, shape: tuple[int, ...], dtypes: tuple[str, ...] = FLOATS) -> Floats:
    values = checkpoint.read(key, dtypes, shape).astype(np.float32, copy=False)
    return Floats(values, checkpoint.tensors[key].dtype)


def _bias(reader: LayerReader, outputs: int) -> Floats | None:
    if reader.checkpoint.prefix(reader.name) + "bias" not in reader.checkpoint.tensors:
        return None
    bias = reader.floats("bias", (outputs,))
    if not bool(np.isfinite(bias.values).all()):
        raise reader.fault("bias", "is not finite")
    return bias


def _multiplier(reader: LayerReader, inputs: int) -> Floats | None:
    key = f"{reader.name}.{MUL_SCALE}"
    if key not in reader.checkpoint.tensors:
        return None
    multiplier = _floats(reader.checkpoint, key, (inputs,))
    reader.positive(MUL_SCALE, multiplier.values)
    return multiplier


def _ranged(reader: LayerReader, layer: LayerNumbers) -> LayerNumbers:
    """Returns a copy of `layer`, a W8A8 or W8A8_TIMESTEP layer, to which the input scale, zero point, deq and
    quant_bias are added. `reader` reads these numbers from the checkpoint. The field `dtype` of the copy is the dtype
    of the stored input scale, which is also the dtype of the float layer."""
    integers, levels = layer.integers, reader.checkpoint.levels
    by_level, weight = integers.scheme == TIMESTEP, integers.weight
    if by_level and not levels:
        raise reader.fault(
            "input_scale", "has a row for each noise level, but the file's metadata list no noise levels"
        )
    leading = (len(levels),) if by_level else ()
    scale, dtype = reader.floats("input_scale", (*leading, 1))
    reader.positive("input_scale", scale)
    offset = reader.floats("input_offset", (*leading, 1), (dtype,)).values
    whole = (offset >= -128) & (offset <= 127) & (offset == np.rint(offset))
    if not bool(whole.all()):
        raise reader.fault("input_offset", f"is {float(offset[~whole][0])}, not a whole number from -128 to 127")
    deq = _deq(reader, dtype, (*leading, len(weight)))
    quant_bias = reader.read("quant_bias", ("int32",), (*leading, len(weight)))
    _check_accumulator(reader, "quant_bias", quant_bias, weight, 128)
    scale, zero_point = scale.reshape(leading), offset.astype(np.int32).reshape(leading)
    integers = integers._replace(input_scale=scale, zero_point=zero_point, deq=deq, quant_bias=quant_bias)
    layer = layer._replace(integers=integers, dtype=dtype)
    return _binned(reader, layer, levels) if by_level else layer


def _deq(reader: LayerReader, dtype: str, shape: tuple[int, ...]) -> Array:
    if dtype == "bfloat16":
        return reader.positive("deq_scale", reader.read("deq_scale", ("float32",), shape))
    bits = reader.read("deq_scale", ("int64",), shape)
    if bool(((bits < 0) | (bits >> 31 != 0)).any()):
        raise reader.fault("deq_scale", "has an int64 value that is not the bits of a positive float32 number")
    return reader.positive("deq_scale", bits.astype(np.int32).view(np.float32))


def _check_accumulator(reader: LayerReader, key: str, quant_bias: Array, weight: Array, largest: int) -> None:
    if int(np.abs(quant_bias.astype(np.int64)).max()) + largest * 127 * weight[0].size >= 2**31:
        raise reader.fault(key, "has values so large that the layer's sum could overflow int32")


def _binned(reader: LayerReader, layer: LayerNumbers, levels: tuple[float, ...]) -> LayerNumbers:
    """Returns a copy of `layer` in which scale, zero point, deq and quant_bias have one row for each timestep bin. In
    `layer` they have one row for each denoising step, as in the file. `levels` are the noise levels of the steps. The
    noise levels that separate the bins are read from the checkpoint of `reader`.

    Raises FileError if a bin contains no step, or if the rows of two steps in the same bin differ.
    """
    edges, integers = reader.checkpoint.edges(reader.name), layer.integers
    bins = np.searchsorted(edges, np.array(levels, np.float32), side="right").tolist()  # as `noise_level.bins_of`
    missing = set(range(len(edges) + 1)) - set(bins)
    if missing:
        raise reader.fault("input_scale", f"has no row for timestep bin {min(missing)} of the layer")
    first = [bins.index(number) for number in range(len(edges) + 1)]
    by_bin = {}
    for key in ("input_scale", "zero_point", "deq", "quant_bias"):
        rows = getattr(integers, key)
        by_bin[key] = rows[first]
        if not np.array_equal(by_bin[key][bins], rows):
            fact = "or another tensor has different rows for two denoising steps in the same bin of noise levels"
            raise reader.fault("input_scale", fact)
    return layer._replace(integers=integers._replace(**by_bin), edges=edges)
