"""Integer layers as modules, which compute on the CPU exactly what the device computes from an exported checkpoint."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .inputs import Input, StaticInput, TimestepInput
from .noise_level import NoiseLevel
from .numbers import Numbers
from .products import integer_convolution, integer_matmul
from .scheme import QParams
from .transforms import TRANSFORMS, Transform, transformed

_ALL = slice(None)


class Geometry(NamedTuple):
    """The geometry of a convolution: stride, padding (left, right, top, bottom), dilation, padding mode, groups."""

    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    padding_mode: str
    groups: int = 1

    @classmethod
    def of(cls, conv: nn.Conv2d) -> "Geometry":
        """The geometry of a float convolution."""
        if conv.padding_mode == "zeros" and not isinstance(conv.padding, str):
            high, wide = _pair(conv.padding)
            around = wide, wide, high, high
        else:  # what a convolution pads by itself, computed when it was made
            left, right, top, bottom = conv._reversed_padding_repeated_twice
            around = left, right, top, bottom
        return cls(_pair(conv.stride), around, _pair(conv.dilation), conv.padding_mode, conv.groups)

    def padded(self, x: Tensor, value: float) -> Tensor:
        """Pads `x` (..., height, width); `value` stands for 0.0."""
        if not any(self.padding):
            return x
        if self.padding_mode == "zeros":
            return F.pad(x, self.padding, value=value)
        return F.pad(x, self.padding, mode=self.padding_mode)

    def size(self, sides: Sequence[int], kernel: Sequence[int]) -> list[int]:
        """Height and width of the output, from the `sides` of a padded input and the kernel's."""
        each = zip(sides, kernel, self.stride, self.dilation, strict=True)
        return [(side - dilation * (extent - 1) - 1) // stride + 1 for side, extent, stride, dilation in each]


def _pair(value: Any) -> tuple[int, int]:
    return (int(value[0]), int(value[1]))


class Ranged(NamedTuple):
    """The numbers of a layer whose input has ranges, at one noise level or with a leading axis for several rows."""

    input: StaticInput
    deq: Tensor
    quant_bias: Tensor


class IntegerLayer(nn.Module):
    """Holds the numbers of a layer as parameters and buffers, so that the layer moves and is counted as any other.

    `input_type` says how the input becomes codes. `noise_level` belongs to the denoiser that the layer is part of,
    where ranges depend on the noise level; see `install`.
    """

    input_scale: Tensor
    input_zero_point: Tensor
    deq: Tensor
    quant_bias: Tensor
    edges: Tensor
    mul_scale: Tensor | None
    weight_scale: Tensor

    def __init__(self, numbers: Numbers) -> None:
        super().__init__()
        self.dtype, self.scheme, self.made_bias = numbers.dtype, numbers.scheme, numbers.made_bias
        self.input_type, self.input_scheme = type(numbers.input), numbers.input.scheme
        self.noise_level: NoiseLevel | None = None
        self.weight = nn.Parameter(numbers.weight, requires_grad=False)
        self.bias = None if numbers.bias is None else nn.Parameter(numbers.bias, requires_grad=False)
        self.register_buffer("weight_scale", numbers.weight_scale)
        held = {} if numbers.transform is None else numbers.transform.tensors
        for name in (name for kind in TRANSFORMS for name in kind.TENSORS):
            self.register_buffer(name, held.get(name))
        for name, tensor in numbers.input.tensors.items():
            self.register_buffer(name, tensor)
        if numbers.input.ranged:
            self.register_buffer("deq", numbers.deq)
            self.register_buffer("quant_bias", numbers.quant_bias)

    @property
    def weight_only(self) -> bool:
        """Whether the input stays float."""
        return not self.input_type.rounded

    @property
    def calibrated(self) -> bool:
        """Whether the ranges of the input are known beforehand: then input_scale, deq and quant_bias exist."""
        return self.input_type.ranged

    @property
    def input(self) -> Input:
        """The way in which the input becomes codes, with its tensors."""
        return self.input_type.of(self._buffers, self.input_scheme)

    @property
    def transform(self) -> Transform | None:
        """The transform of the input before it becomes codes; None without one."""
        held = (kind for kind in TRANSFORMS if all(self._buffers[name] is not None for name in kind.TENSORS))
        kind = next(held, None)
        return None if kind is None else kind.of(self._buffers)

    @property
    def numbers(self) -> Numbers:
        """The numbers of this layer."""
        bias = None if self.bias is None else self.bias.detach()
        deq, quant_bias = (self.deq, self.quant_bias) if self.calibrated else (None, None)
        return Numbers(
            self.weight.detach(), self.weight_scale, bias, self.input, self.dtype, self.transform, deq, quant_bias,
            self.made_bias,
        )  # fmt: skip

    def forward(self, input: Tensor) -> Tensor:
        """The output, in the dtype of the input."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves all tensors; a cast of the model reaches only the bias and the transform's tensors, which follow its
        dtype."""
        following = [self.bias, *(self._buffers[name] for kind in TRANSFORMS for name in kind.TENSORS)]

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            follows = result.dtype == tensor.dtype or any(tensor is each for each in following)
            return result if follows else tensor.to(result.device)

        return super()._apply(moved, recurse)

    def _ranged(self, rows: int | None) -> Ranged:
        """The numbers for an input of `rows` rows: with a leading axis where each row has its own noise level."""
        input, deq, quant_bias = self.input, self.deq, self.quant_bias
        if isinstance(input, TimestepInput):
            bins = (self.noise_level or NoiseLevel()).bins(input.edges, rows)
            input, deq, quant_bias = input.at(bins), deq[bins], quant_bias[bins]
        assert isinstance(input, StaticInput)
        return Ranged(input, deq, quant_bias)

    def transformed(self, x: Tensor, axis: int) -> Tensor:
        """`x` after the transform of the input, whose channels are the `axis` counted from the end."""
        return transformed(self.transform, x, axis)

    def _float(self, dtype: torch.dtype, at: slice = _ALL) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the outputs `at` as floats. In two steps: int8 times float32 is ten times slower."""
        weight = self.weight[at].detach().to(torch.float32)
        weight.mul_(self.weight_scale[at].view([-1] + [1] * (weight.ndim - 1)))
        return weight.to(dtype), None if self.bias is None else self.bias[at].to(dtype)


class QuantizedLinear(IntegerLayer):
    """An nn.Linear in integers: input (..., in_features), output (..., out_features) in the input's dtype."""

    def __init__(self, numbers: Numbers) -> None:
        super().__init__(numbers)
        self.out_features, self.in_features = numbers.weight.shape

    def forward(self, input: Tensor) -> Tensor:
        return self.computed(input, integer_matmul)

    def computed(self, input: Tensor, matmul: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The output, with sums of products from `matmul`, which takes and returns what `integer_matmul` does."""
        x = self.transformed(input, -1)
        if self.weight_only:
            return F.linear(x, *self._float(x.dtype))
        if not self.calibrated:
            codes = self.input.codes(x)
            y = matmul(codes.q, self.weight).to(torch.float32) * (codes.scale * self.weight_scale)
            return (y if self.bias is None else y + self.bias).to(input.dtype)
        here = _before_the_last(self._ranged(len(x) if x.ndim > 1 else None), x.ndim)
        total = matmul(here.input.codes(x).q, self.weight)
        return (total.add_(here.quant_bias).to(torch.float32) * here.deq).to(input.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.scheme}"


def _before_the_last(here: Ranged, ndim: int) -> Ranged:
    """Reshapes numbers with a leading axis for an input of `ndim` axes, whose last axis is summed over."""
    (scale, zero_point), deq, quant_bias = here.input.qparams, here.deq, here.quant_bias
    if scale.ndim == 0:
        return here
    rows, between = len(scale), [1] * (ndim - 2)
    qparams = QParams(scale.view(rows, *between, 1), zero_point.view(rows, *between, 1))
    input = StaticInput(qparams, scheme=here.input.scheme)
    return Ranged(input, deq.view(rows, *between, -1), quant_bias.view(rows, *between, -1))


class QuantizedConv2d(IntegerLayer):
    """An nn.Conv2d in integers: (batch, in, height, width) to (batch, out, ...), or without the batch.

    The codes are padded, with the zero point, which stands for 0.0.
    """

    def __init__(self, numbers: Numbers, geometry: Geometry) -> None:
        super().__init__(numbers)
        self.out_channels, channels, *size = numbers.weight.shape
        self.kernel_size, self.geometry = tuple(size), geometry
        self.stride, self.dilation, self.padding_mode = geometry.stride, geometry.dilation, geometry.padding_mode
        self.groups = geometry.groups
        self.in_channels = channels * self.groups

    def forward(self, input: Tensor) -> Tensor:
        return self.computed(input, self._exact)

    def computed(self, input: Tensor, convolve: Callable[[Tensor], Tensor]) -> Tensor:
        """The output, with sums of products from `convolve`, which takes padded codes in float32 and returns int32."""
        x = self.transformed(input, -3)
        if self.weight_only:
            return self._convolved(self.geometry.padded(x, 0.0), *self._float(x.dtype))
        if not self.calibrated:
            codes = self.input.codes(x, axes=(-3, -2, -1))
            y = convolve(self.geometry.padded(codes.q, 0.0)).to(torch.float32)
            y = y * (codes.scale * self.weight_scale.view(-1, 1, 1))
            return (y if self.bias is None else y + self.bias.view(-1, 1, 1)).to(input.dtype)
        here = self._ranged(len(x) if x.ndim == 4 else None)
        if here.input.qparams.scale.ndim == 0:
            return self._calibrated(x, here, convolve).to(input.dtype)
        rows = zip(x, *here.input.qparams, here.deq, here.quant_bias, strict=True)
        each = [
            self._calibrated(row, Ranged(StaticInput(QParams(s, z), scheme=here.input.scheme), deq, bias), convolve)
            for row, s, z, deq, bias in rows
        ]
        return torch.stack(each).to(input.dtype)

    def _calibrated(self, x: Tensor, here: Ranged, convolve: Callable[[Tensor], Tensor]) -> Tensor:
        total = convolve(self.geometry.padded(here.input.codes(x).q, float(here.input.qparams.zero_point)))
        return total.add_(here.quant_bias.view(-1, 1, 1)).to(torch.float32) * here.deq.view(-1, 1, 1)

    def _exact(self, padded: Tensor) -> Tensor:
        images = padded if padded.ndim == 4 else padded.unsqueeze(0)
        total = integer_convolution(images, self.weight.detach(), self.stride, self.dilation, self.groups)
        return total if padded.ndim == 4 else total[0]

    def _convolved(self, padded: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(padded, weight, bias, self.stride, 0, self.dilation, self.groups)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"groups={self.groups}"
        )


QuantizedLayer = QuantizedLinear | QuantizedConv2d


def build(numbers: Numbers, module: nn.Module) -> QuantizedLayer:
    """The integer layer that takes the place of the float `module`."""
    return QuantizedConv2d(numbers, Geometry.of(module)) if isinstance(module, nn.Conv2d) else QuantizedLinear(numbers)
