"""8-bit layers as modules. Those with integer codes compute on the CPU exactly what an Ascend device computes from an
exported checkpoint; those with FP8 codes compute, up to float32 rounding, the product of the values of their codes."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .inputs import Input, StaticInput, TimestepInput
from .noise_level import NoiseLevel
from .numbers import Numbers
from .products import code_matmul, float_convolution, integer_convolution
from .scheme import QParams, in_float32
from .transforms import TRANSFORMS, Transform, transformed
from .weights import decoded, spread

_ALL = slice(None)


class Geometry(NamedTuple):
    """The geometry of a convolution. `stride` and `dilation` are (vertical, horizontal), `padding` is (left, right,
    top, bottom); `padding_mode` and `groups` are as in nn.Conv2d."""

    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    padding_mode: str
    groups: int = 1

    @classmethod
    def of(cls, conv: nn.Conv2d) -> "Geometry":
        """Returns the geometry of a float convolution."""
        if conv.padding_mode == "zeros" and not isinstance(conv.padding, str):
            high, wide = _pair(conv.padding)
            padding = wide, wide, high, high
        else:  # the padding in the form that the convolution computed when it was made
            left, right, top, bottom = conv._reversed_padding_repeated_twice
            padding = left, right, top, bottom
        return cls(_pair(conv.stride), padding, _pair(conv.dilation), conv.padding_mode, conv.groups)

    def padded(self, x: Tensor, value: float) -> Tensor:
        """Returns `x` (..., height, width) with the padding of the convolution. In padding mode "zeros" the padding is
        filled with `value`: the zero point if `x` holds codes, else 0.0."""
        if not any(self.padding):
            return x
        if self.padding_mode == "zeros":
            return F.pad(x, self.padding, value=value)
        return F.pad(x, self.padding, mode=self.padding_mode)

    def size(self, sides: Sequence[int], kernel: Sequence[int]) -> list[int]:
        """Returns height and width of the output, from `sides`, height and width of the padded input, and `kernel`,
        height and width of the kernel."""
        axes = zip(sides, kernel, self.stride, self.dilation, strict=True)
        return [(side - dilation * (extent - 1) - 1) // stride + 1 for side, extent, stride, dilation in axes]


def _pair(value: Any) -> tuple[int, int]:
    return (int(value[0]), int(value[1]))


class RangedNumbers(NamedTuple):
    """The range (`input`), deq and quant_bias of one call of a layer whose ranges are known beforehand. The output of
    the layer is (sum of products + quant_bias) * deq. With FP8 codes, `quant_bias` is None, deq is input scale * weight
    scale, and the float bias is added to sum of products * deq.

    If the rows of the input have different noise levels, the tensors of `input`, `deq` and `quant_bias` have a leading
    axis with an entry for each row.
    """

    input: StaticInput
    deq: Tensor
    quant_bias: Tensor | None


class IntegerLayer(nn.Module):
    """Base of the integer layers: stores the numbers of a layer (class Numbers) as parameters (weight and bias) and
    buffers (all others), so that `to` moves them.

    `input_type` is the class that says how the input becomes codes, such as StaticInput. `noise_level` is None until
    the layer is put into a denoiser (install.py). If ranges depend on the noise level, all layers of the denoiser then
    have the same NoiseLevel object as `noise_level`; it holds the noise level of the denoiser's current call.
    """

    input_scale: Tensor
    input_zero_point: Tensor
    deq: Tensor
    quant_bias: Tensor
    edges: Tensor
    mul_scale: Tensor | None
    rotation: Tensor | None
    weight_scale: Tensor

    def __init__(self, numbers: Numbers) -> None:
        super().__init__()
        self.dtype, self.scheme, self.made_bias = numbers.dtype, numbers.scheme, numbers.made_bias
        self.input_type, self.input_scheme = type(numbers.input), numbers.input.scheme
        self.noise_level: NoiseLevel | None = None
        self.weight = nn.Parameter(numbers.weight, requires_grad=False)
        self.bias = None if numbers.bias is None else nn.Parameter(numbers.bias, requires_grad=False)
        self.register_buffer("weight_scale", numbers.weight_scale)
        tensors = {} if numbers.transform is None else numbers.transform.tensors
        for name in dict.fromkeys(name for kind in TRANSFORMS for name in kind.TENSORS):
            self.register_buffer(name, tensors.get(name))
        for name, tensor in numbers.input.tensors.items():
            self.register_buffer(name, tensor)
        if numbers.input.integer_bias:
            self.register_buffer("deq", numbers.deq)
            self.register_buffer("quant_bias", numbers.quant_bias)

    @property
    def weight_only(self) -> bool:
        """True if the input stays float."""
        return not self.input_type.rounded

    @property
    def calibrated(self) -> bool:
        """True if the ranges of the input are known beforehand (static or by noise level); the layer then has
        input_scale, and with integer codes deq and quant_bias."""
        return self.input_type.ranged

    @property
    def integer(self) -> bool:
        """True if codes are integers, False if they are FP8 numbers."""
        return self.input_scheme.element.integer

    @property
    def input(self) -> Input:
        """The object that turns the layer's input into codes, with its scales, its zero points, and the noise levels
        between timestep bins."""
        return self.input_type.of(self._buffers, self.input_scheme)

    @property
    def transform(self) -> Transform | None:
        """The transform of the input before it becomes codes; None without a transform."""
        kinds = (kind for kind in TRANSFORMS if all(self._buffers[name] is not None for name in kind.TENSORS))
        kind = next(kinds, None)
        return None if kind is None else kind.of(self._buffers)

    @property
    def numbers(self) -> Numbers:
        """The weight codes, scales, deq and so on of the layer, as an object from which an equal layer can be made."""
        bias = None if self.bias is None else self.bias.detach()
        deq, quant_bias = (self.deq, self.quant_bias) if self.calibrated and self.integer else (None, None)
        return Numbers(
            self.weight.detach(), self.weight_scale, bias, self.input, self.dtype, self.transform, deq, quant_bias,
            self.made_bias,
        )  # fmt: skip

    def forward(self, input: Tensor) -> Tensor:
        """Returns the output, in the dtype of the input."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Applies `fn`, a move or a cast, to all tensors of the layer (`recurse`: as in nn.Module). A cast of the model
        only changes the dtype of the bias and of the transform's tensors; the other tensors keep theirs."""
        cast = [self.bias, *(self._buffers[name] for kind in TRANSFORMS for name in kind.TENSORS)]

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            keep = result.dtype == tensor.dtype or any(tensor is cast_tensor for cast_tensor in cast)
            return result if keep else tensor.to(result.device)

        return super()._apply(moved, recurse)

    def _ranged(self, rows: int | None) -> RangedNumbers:
        """Returns the range, deq and quant_bias for the denoiser's current call. `rows` is the number of rows of the
        input; None for an input without an axis of rows. If the call has a noise level for each row, these tensors have
        a leading axis with an entry for each row."""
        input, index = self.input, None
        if isinstance(input, TimestepInput):
            index = (self.noise_level or NoiseLevel()).bins(input.edges, rows)
            input = input.in_bins(index)
        assert isinstance(input, StaticInput)
        if not self.integer:
            return RangedNumbers(input, input.qparams.scale.unsqueeze(-1) * self.weight_scale, None)
        if index is None:
            return RangedNumbers(input, self.deq, self.quant_bias)
        return RangedNumbers(input, self.deq[index], self.quant_bias[index])

    def transformed(self, x: Tensor, axis: int) -> Tensor:
        """Returns `x` after the transform of the input. The channels of `x` are along `axis`, a negative number."""
        return transformed(self.transform, x, axis)

    def _float_weight(self, dtype: torch.dtype, outputs: slice = _ALL) -> tuple[Tensor, Tensor | None]:
        """Returns the dequantized weight and the bias (None without one) of the output channels `outputs`, in `dtype`.
        Converts the codes to float32 before it multiplies them by the scale, because multiplying int8 by float32 in one
        operation takes ten times as long."""
        weight = in_float32(self.weight[outputs].detach())
        weight.mul_(spread(decoded(self.weight_scale[outputs]), weight))
        return weight.to(dtype), None if self.bias is None else self.bias[outputs].to(dtype)


class QuantizedLinear(IntegerLayer):
    """Computes an nn.Linear with 8-bit codes: input (..., in_features), output (..., out_features) in the input's
    dtype."""

    def __init__(self, numbers: Numbers) -> None:
        super().__init__(numbers)
        self.out_features, self.in_features = numbers.weight.shape

    def forward(self, input: Tensor) -> Tensor:
        return self.computed(input, code_matmul)

    def computed(self, input: Tensor, matmul: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Returns the output for `input`. `matmul` takes the codes of the input (..., in) and those of the weight (out,
        in), and returns their product (..., out), as `code_matmul` does. In MXFP8, where blocks of channels have
        scales, `matmul` gets the values that the codes stand for instead of the codes."""
        x = self.transformed(input, -1)
        if self.weight_only:
            return F.linear(x, *self._float_weight(x.dtype))
        if not self.calibrated:
            codes = self.input.codes(x)
            if self.input_scheme.block is not None:
                y = matmul(codes.q * codes.scale, self._float_weight(torch.float32)[0])
            else:
                y = matmul(codes.q, self.weight).to(torch.float32) * (codes.scale * self.weight_scale)
            return self._with_bias(y).to(input.dtype)
        numbers = _with_row_axis(self._ranged(len(x) if x.ndim > 1 else None), x.ndim)
        total = matmul(numbers.input.codes(x).q, self.weight)
        if numbers.quant_bias is None:
            return self._with_bias(total * numbers.deq).to(input.dtype)
        return (total.add_(numbers.quant_bias).to(torch.float32) * numbers.deq).to(input.dtype)

    def _with_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.scheme}"


def _with_row_axis(numbers: RangedNumbers, ndim: int) -> RangedNumbers:
    """Returns `numbers`, reshaped to broadcast against an input of `ndim` axes, rows first and channels last. If
    `numbers` do not differ between rows (their scale is 0-d), returns them unchanged."""
    (scale, zero_point), deq, quant_bias = numbers.input.qparams, numbers.deq, numbers.quant_bias
    if scale.ndim == 0:
        return numbers
    rows, middle = len(scale), [1] * (ndim - 2)
    qparams = QParams(scale.view(rows, *middle, 1), zero_point.view(rows, *middle, 1))
    input = StaticInput(qparams, scheme=numbers.input.scheme)
    offset = None if quant_bias is None else quant_bias.view(rows, *middle, -1)
    return RangedNumbers(input, deq.view(rows, *middle, -1), offset)


class QuantizedConv2d(IntegerLayer):
    """Computes an nn.Conv2d with 8-bit codes: input (batch, in, height, width), output (batch, out, height, width), or
    both without the batch axis.

    In padding mode "zeros" the codes of the input are padded with the zero point, the code that stands for 0.0.
    """

    def __init__(self, numbers: Numbers, geometry: Geometry) -> None:
        super().__init__(numbers)
        self.out_channels, channels, *size = numbers.weight.shape
        self.kernel_size, self.geometry = tuple(size), geometry
        self.stride, self.dilation, self.padding_mode = geometry.stride, geometry.dilation, geometry.padding_mode
        self.groups = geometry.groups
        self.in_channels = channels * self.groups

    def forward(self, input: Tensor) -> Tensor:
        return self.computed(input, self._convolve_codes)

    def computed(self, input: Tensor, convolve: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns the output for `input`. `convolve` takes the padded codes of the input in float32, and returns the
        sums of products, ([batch,] out, height, width), int32 or, for FP8 codes, float32."""
        x = self.transformed(input, -3)
        if self.weight_only:
            return self._convolved(self.geometry.padded(x, 0.0), *self._float_weight(x.dtype))
        if not self.calibrated:
            codes = self.input.codes(x, axes=(-3, -2, -1))
            y = convolve(self.geometry.padded(codes.q, 0.0)).to(torch.float32)
            y = y * (codes.scale * self.weight_scale.view(-1, 1, 1))
            return self._with_bias(y).to(input.dtype)
        numbers = self._ranged(len(x) if x.ndim == 4 else None)
        if numbers.input.qparams.scale.ndim == 0:
            return self._calibrated(x, numbers, convolve).to(input.dtype)
        offsets = [None] * len(x) if numbers.quant_bias is None else numbers.quant_bias
        rows = zip(x, *numbers.input.qparams, numbers.deq, offsets, strict=True)
        images = [
            self._calibrated(
                row, RangedNumbers(StaticInput(QParams(s, z), scheme=numbers.input.scheme), deq, bias), convolve
            )
            for row, s, z, deq, bias in rows
        ]
        return torch.stack(images).to(input.dtype)

    def _calibrated(self, x: Tensor, numbers: RangedNumbers, convolve: Callable[[Tensor], Tensor]) -> Tensor:
        total = convolve(self.geometry.padded(numbers.input.codes(x).q, float(numbers.input.qparams.zero_point)))
        deq = numbers.deq.view(-1, 1, 1)
        if numbers.quant_bias is None:
            return self._with_bias(total * deq)
        return total.add_(numbers.quant_bias.view(-1, 1, 1)).to(torch.float32) * deq

    def _with_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)

    def _convolve_codes(self, padded: Tensor) -> Tensor:
        images = padded if padded.ndim == 4 else padded.unsqueeze(0)
        convolution = integer_convolution if self.integer else float_convolution
        total = convolution(images, self.weight.detach(), self.stride, self.dilation, self.groups)
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
    """Returns the integer layer with these `numbers`, to replace the float `module`, an nn.Linear or nn.Conv2d."""
    return QuantizedConv2d(numbers, Geometry.of(module)) if isinstance(module, nn.Conv2d) else QuantizedLinear(numbers)
