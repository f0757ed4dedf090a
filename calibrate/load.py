"""Reading an ascend checkpoint back into integer layers: the same integers, each checked before use."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capture.errors import damage
from capture.sealed import read_bytes

from .errors import CalibrateError
from .export.ascend import DESCRIPTION_FILE, GEOMETRY, MODEL_TYPE, WEIGHT_FILE, unpacked
from .freeze import Numbers, Static
from .layers import Geometry, QuantizedConv2d, QuantizedLayer, QuantizedLinear
from .scheme import QParams
from .tensors import Stored, read_header, read_tensor

SCHEMES = ("W8A8", "W8A16")
_DESCRIPTION_LIMIT = 64 << 20


class Checkpoint:
    """An ascend checkpoint that is open for reading: its description and where its tensors are.

    Raises CaptureError 3 for files that are missing, damaged or not this format.
    """

    def __init__(self, directory: Path | str, names: tuple[str, str] | None = None) -> None:
        self.directory = Path(directory)
        weight_name, description_name = names or find(self.directory)
        self.weight_path, self.description_path = self.directory / weight_name, self.directory / description_name
        self.description = read_description(self.description_path)
        self.tensors, self.metadata = read_header(self.weight_path)
        self.scheme = self.description.get(MODEL_TYPE)
        if self.scheme not in SCHEMES:
            raise damage(self.description_path, f"{MODEL_TYPE} is {self.scheme!r}", f"Known are {', '.join(SCHEMES)}.")

    @property
    def layer_names(self) -> list[str]:
        """The quantized layers."""
        ends = ".weight"
        return [k[: -len(ends)] for k, word in self.description.items() if word in SCHEMES and k.endswith(ends)]

    def read(self, key: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...] | None = None) -> Tensor:
        """One tensor, of one of these dtypes and of this shape."""
        stored = self.tensors.get(key)
        if stored is None:
            raise damage(self.weight_path, f"{key} is missing")
        if stored.dtype not in dtypes or (shape is not None and stored.shape != shape):
            raise damage(self.weight_path, f"{key} is {_words(stored)}")
        return read_tensor(self.weight_path, stored)

    def layer(self, name: str) -> QuantizedLayer:
        """One quantized layer."""
        weight = self.read(f"{name}.weight", (torch.int8,))
        if weight.ndim not in (2, 4) or not weight.numel():
            raise self._wrong(name, "weight", f"has shape {tuple(weight.shape)}")
        if int(weight.min()) < -127:
            raise self._wrong(name, "weight", "holds -128")
        outputs = weight.shape[0]
        scale = self._positive(name, "weight_scale", (torch.float32,), (outputs, 1)).view(outputs)
        bias = None
        if f"{name}.bias" in self.tensors:
            bias = self.read(f"{name}.bias", (torch.float32, torch.float16, torch.bfloat16), (outputs,))
            if not bool(bias.isfinite().all()):
                raise self._wrong(name, "bias", "is not finite")
        activation, dtype = None, torch.float32 if bias is None else bias.dtype
        if self.description[f"{name}.weight"] == "W8A8":
            activation, dtype = self._activation(name, weight)
        numbers = Numbers(weight, scale, bias, activation, dtype)
        if weight.ndim == 2:
            return QuantizedLinear(numbers)
        return QuantizedConv2d(numbers, self._geometry(name))

    def _activation(self, name: str, weight: Tensor) -> tuple[Static, torch.dtype]:
        outputs = weight.shape[0]
        floats = (torch.float32, torch.float16, torch.bfloat16)
        scale = self._positive(name, "input_scale", floats, (1,))
        offset = float(self.read(f"{name}.input_offset", (scale.dtype,), (1,)))
        if not (-128 <= offset <= 127 and offset.is_integer()):
            raise self._wrong(name, "input_offset", f"is {offset}")
        key = f"{name}.deq_scale"
        if scale.dtype == torch.bfloat16:
            deq = self.read(key, (torch.float32,), (outputs,))
        else:
            bits = self.read(key, (torch.int64,), (outputs,))
            if bool(((bits < 0) | (bits >> 31 != 0)).any()):
                raise self._wrong(name, "deq_scale", "is not the bits of positive float32 numbers")
            deq = unpacked(bits)
        if not bool(((deq > 0) & deq.isfinite()).all()):
            raise self._wrong(name, "deq_scale", "is not positive and finite")
        quant_bias = self.read(f"{name}.quant_bias", (torch.int32,), (outputs,))
        if int(quant_bias.long().abs().max()) + 128 * 127 * weight[0].numel() >= 2**31:
            raise self._wrong(name, "quant_bias", "could leave int32 in the accumulator")
        qparams = QParams(scale.float().view(()), torch.tensor(int(offset), dtype=torch.int32))
        return Static(qparams, deq, quant_bias), scale.dtype

    def _positive(self, name: str, key: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> Tensor:
        tensor = self.read(f"{name}.{key}", dtypes, shape)
        if not bool(((tensor > 0) & tensor.isfinite()).all()):
            raise self._wrong(name, key, "is not positive and finite")
        return tensor

    def _geometry(self, name: str) -> Geometry:
        try:
            found: dict[str, Any] = json.loads(self.metadata[GEOMETRY])[name]
            values = [found["stride"], found["padding"], found["dilation"]]
            stride, padding, dilation = (tuple(int(number) for number in value) for value in values)
            if (len(stride), len(padding), len(dilation)) != (2, 4, 2) or min(stride + dilation) < 1:
                raise ValueError("sizes")
            return Geometry(stride, padding, dilation, str(found["padding_mode"]))  # type: ignore[arg-type]
        except (KeyError, ValueError, TypeError) as error:
            raise self._wrong(name, "weight", "is a convolution of unknown stride and padding") from error

    def _wrong(self, name: str, key: str, fact: str) -> CalibrateError:
        return CalibrateError(f"{self.weight_path}: {name}.{key} {fact}. Write the checkpoint anew.", 3)


def find(directory: Path) -> tuple[str, str]:
    """The names of weights and description in a directory."""
    for scheme in SCHEMES:
        names = WEIGHT_FILE.format(scheme.lower()), DESCRIPTION_FILE.format(scheme.lower())
        if (directory / names[1]).is_file():
            return names
    wanted = DESCRIPTION_FILE.format("w8a8")
    raise CalibrateError(f"{directory}: no ascend checkpoint (no {wanted}). Give the directory of one.", 3)


def read_description(path: Path) -> dict[str, str]:
    """The description: names to words."""
    try:
        found = json.loads(read_bytes(path, _DESCRIPTION_LIMIT))
    except (ValueError, RecursionError) as error:
        raise damage(path, "not valid JSON") from error
    if not isinstance(found, dict) or not all(isinstance(word, str) for word in found.values()):
        raise damage(path, "not a description of tensors")
    return found


def _words(stored: Stored) -> str:
    return f"{str(stored.dtype).removeprefix('torch.')} {list(stored.shape)}"


def load_ascend(directory: Path | str) -> dict[str, QuantizedLayer]:
    """The quantized layers of a checkpoint by name, with the very integers that were exported.

    Raises CaptureError 3 for files that are missing, damaged, or hold numbers that no export writes.
    """
    checkpoint = Checkpoint(directory)
    return {name: checkpoint.layer(name) for name in checkpoint.layer_names}
