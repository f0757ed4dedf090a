"""Integer layers: they compute on the CPU exactly what the device computes from an exported checkpoint.

Products of int8 numbers are summed in float32, which is exact while every partial sum is a whole number below 2**24:
up to 1032 products. Longer sums are taken in pieces that are added as int32.
"""

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .freeze import Activation, Numbers
from .scheme import ACTIVATION, QParams, codes

_PIECE = 1024  # 1024 * 128 * 127 < 2**24


class Geometry(NamedTuple):
    """How a convolution moves over its input: `padding` is left, right, top, bottom."""

    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    padding_mode: str

    @classmethod
    def of(cls, conv: nn.Conv2d) -> "Geometry":
        """The geometry of a float convolution."""
        around = tuple(conv._reversed_padding_repeated_twice)
        return cls(_pair(conv.stride), around, _pair(conv.dilation), conv.padding_mode)  # type: ignore[arg-type]


def _pair(value: Any) -> tuple[int, int]:
    return (int(value[0]), int(value[1]))


class _Integer(nn.Module):
    """Holds the numbers of a layer as parameters and buffers, so that they move and are counted as a layer's are."""

    input_scale: Tensor
    input_zero_point: Tensor
    deq: Tensor
    quant_bias: Tensor
    weight_scale: Tensor

    def __init__(self, numbers: Numbers) -> None:
        super().__init__()
        self.dtype = numbers.dtype
        self.weight = nn.Parameter(numbers.weight, requires_grad=False)
        self.bias = None if numbers.bias is None else nn.Parameter(numbers.bias, requires_grad=False)
        self.register_buffer("weight_scale", numbers.weight_scale)
        self.weight_only = numbers.activation is None
        if numbers.activation is not None:
            self.register_buffer("input_scale", numbers.activation.qparams.scale)
            self.register_buffer("input_zero_point", numbers.activation.qparams.zero_point)
            self.register_buffer("deq", numbers.activation.deq)
            self.register_buffer("quant_bias", numbers.activation.quant_bias)

    @property
    def numbers(self) -> Numbers:
        """The numbers this layer computes with."""
        activation = None
        if not self.weight_only:
            activation = Activation(QParams(self.input_scale, self.input_zero_point), self.deq, self.quant_bias)
        bias = None if self.bias is None else self.bias.detach()
        return Numbers(self.weight.detach(), self.weight_scale, bias, activation, self.dtype)

    def _codes(self, x: Tensor) -> Tensor:
        return codes(x, QParams(self.input_scale, self.input_zero_point), ACTIVATION)

    def _float_weight(self, dtype: torch.dtype) -> Tensor:
        scale = self.weight_scale.view([-1] + [1] * (self.weight.ndim - 1))
        return (self.weight * scale).to(dtype)


class QuantizedLinear(_Integer):
    """An nn.Linear in integers: input (..., in_features), output (..., out_features) in the input's dtype."""

    def __init__(self, numbers: Numbers) -> None:
        super().__init__(numbers)
        self.out_features, self.in_features = numbers.weight.shape

    def forward(self, input: Tensor) -> Tensor:
        if self.weight_only:
            return F.linear(input, self._float_weight(input.dtype), self.bias)
        total = integer_matmul(self._codes(input), self.weight)
        return (total.add_(self.quant_bias).to(torch.float32) * self.deq).to(input.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, weight_only={self.weight_only}"


def integer_matmul(q: Tensor, weight: Tensor) -> Tensor:
    """`q` (..., in), whole numbers of int8 in float32, times `weight` int8 (out, in), exactly: int32 (..., out)."""
    total: Tensor | None = None
    for start in range(0, weight.shape[1], _PIECE):
        piece = weight[:, start : start + _PIECE].to(torch.float32)
        part = F.linear(q[..., start : start + _PIECE], piece).to(torch.int32)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


class QuantizedConv2d(_Integer):
    """An nn.Conv2d of one group in integers: (batch, in, height, width) to (batch, out, ...), or without the batch.

    Padding is done on the integers, with the zero point: it stands for 0.0.
    """

    def __init__(self, numbers: Numbers, geometry: Geometry) -> None:
        super().__init__(numbers)
        self.out_channels, self.in_channels, *size = numbers.weight.shape
        self.kernel_size, self.geometry = tuple(size), geometry
        self.stride, self.dilation, self.padding_mode = geometry.stride, geometry.dilation, geometry.padding_mode
        self.groups = 1

    def forward(self, input: Tensor) -> Tensor:
        if self.weight_only:
            padded = self._padded(input, 0.0)
            return F.conv2d(padded, self._float_weight(input.dtype), self.bias, self.stride, 0, self.dilation)
        q = self._padded(self._codes(input), float(self.input_zero_point))
        # float64 takes sums of any length, and no Winograd transform with its rounding
        total = F.conv2d(q.double(), self.weight.double(), None, self.stride, 0, self.dilation).to(torch.int32)
        shape = (-1, 1, 1)
        y = total.add_(self.quant_bias.view(shape)).to(torch.float32) * self.deq.view(shape)
        return y.to(input.dtype)

    def _padded(self, x: Tensor, value: float) -> Tensor:
        if not any(self.geometry.padding):
            return x
        if self.padding_mode == "zeros":
            return F.pad(x, self.geometry.padding, value=value)
        return F.pad(x, self.geometry.padding, mode=self.padding_mode)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"


QuantizedLayer = QuantizedLinear | QuantizedConv2d


def build(numbers: Numbers, module: nn.Module) -> QuantizedLayer:
    """The integer layer that takes the place of the float `module`."""
    return QuantizedConv2d(numbers, Geometry.of(module)) if isinstance(module, nn.Conv2d) else QuantizedLinear(numbers)


def names_of(model: nn.Module) -> dict[str, list[str]]:
    """The first name of each module, and all its names: a module that two others share has several."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return {each[0]: each for each in names.values()}


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` where `name` is, once."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def install(model: nn.Module, layers: MutableMapping[str, QuantizedLayer] | Mapping[str, QuantizedLayer]) -> None:
    """Replaces the layers of `model` for good; the float ones are let go."""
    names = names_of(model)
    for first, layer in layers.items():
        for name in names[first]:
            replace(model, name, layer)


@contextmanager
def quantized(model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> Iterator[nn.Module]:
    """Inside, `model` computes with the integer layers; afterwards, whatever happens, it is what it was."""
    names = names_of(model)
    before = {name: model.get_submodule(name) for first in layers for name in names[first]}
    install(model, layers)
    try:
        yield model
    finally:
        for name, module in before.items():
            replace(model, name, module)
