"""Rounds weights to 8-bit codes, with a symmetric scale for each output channel, and checks that numbers are finite."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from octavo.capture.errors import NumbersError

from .scheme import STORABLE, WEIGHT, QParams, Scheme, block_scales, in_float32, quantize

_SMALLEST = 2.0**-126  # the smallest normal float32


class QuantizedWeight(NamedTuple):
    """A quantized weight: `weight` holds the codes in the shape of the float weight; `scale` is float32 (out,), 1 for a
    channel of zeros. With blocks of 32 columns that share a scale (MXFP8), `scale` is (out, in / 32)."""

    weight: Tensor
    scale: Tensor

    @property
    def spread_scale(self) -> Tensor:
        """The scales, reshaped to broadcast against `weight`: (out, 1), (out, 1, 1, 1), or (out, in) for blocks."""
        return spread(self.scale, self.weight)


def spread(scale: Tensor, weight: Tensor) -> Tensor:
    """Returns the scales of a weight, (out,) or (out, blocks), reshaped to broadcast against `weight`: (out, 1, ...)
    with one axis for each of the weight, or (out, in), in which the scale of a block is repeated for its columns."""
    if scale.ndim == 2:
        return scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1)
    return scale.view([-1] + [1] * (weight.ndim - 1))


def decoded(scale: Tensor) -> Tensor:
    """Returns in float32 the scales of a weight as they are stored. Scales stored as uint8 are powers of two, of which
    each uint8 is the exponent plus 127."""
    if scale.dtype != torch.uint8:
        return scale
    return torch.ldexp(torch.ones(scale.shape, device=scale.device), scale.to(torch.int32) - 127)


def encoded(scale: Tensor) -> Tensor:
    """Returns powers of two, float32, in the form in which they are stored: their exponents plus 127, uint8."""
    return (torch.frexp(scale).exponent + 126).to(torch.uint8)


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises NumbersError if the tensor called `name` contains NaN or infinities; the message counts them."""
    if not finite(tensor):
        bad = tensor.numel() - int(tensor.isfinite().sum())
        raise NumbersError(f"{name}: {bad} of {tensor.numel()} values are not finite. Check the model's files.")


def finite(tensor: Tensor) -> bool:
    """Returns whether the tensor contains neither NaN nor infinities."""
    if tensor.dtype not in STORABLE or not tensor.numel():
        return bool((in_float32(tensor) if tensor.dtype == torch.float8_e4m3fn else tensor).isfinite().all())
    low, high = torch.aminmax(tensor.detach())  # 15 to 60 times as fast as a mask; with a NaN both ends are NaN
    return math.isfinite(low) and math.isfinite(high)


def round_to_nearest(
    weight: Tensor, inputs: object = None, *, scheme: Scheme = WEIGHT, iterations: int = 0
) -> QuantizedWeight | None:
    """Scales each output channel so that its largest absolute value becomes the largest code of `scheme`, such as 127
    or -127 of int8, and rounds all values to the nearest code. In MXFP8, each block has a power of two as its scale:
    the better of two, by squared error.

    `scheme` is the rule by which weights become codes. `inputs` and `iterations` are not used; other rounding methods,
    which have the same arguments, use them. Takes 4 * out * in floating-point operations. Returns None if a channel is
    so small that float32 has no scale for it.
    """
    scale = scales_of(weight, scheme)
    if scale is None:
        return None
    return QuantizedWeight(quantize(weight.detach(), QParams(scale, torch.zeros_like(scale)), scheme), scale)


def scales_of(weight: Tensor, scheme: Scheme = WEIGHT) -> Tensor | None:
    """Returns the scale of each output channel of `weight`, (out,) float32, at which the channel's largest absolute
    value becomes the largest code of `scheme`. With `scheme.per_tensor`, all channels get the scale of the largest
    absolute value in the whole weight, or of `scheme.largest`, if that is set because several weights share a scale.
    Returns None if any channel is so small that float32 has no scale for it.

    With `scheme.block`, returns (out, blocks): a power of two for each block of inputs. Two powers are compared, the
    smallest at which no code is clamped, and one at which codes from 448 to 512 are clamped to 448; the one with the
    smaller squared error is taken.
    """
    flat = weight.detach().reshape(weight.shape[0], -1)
    if scheme.block is not None:
        return least_error_scales(flat.to(torch.float32), scheme)
    largest = torch.maximum(flat.amax(1), flat.amin(1).neg()).to(torch.float64)
    if scheme.per_tensor:
        whole = largest.amax() if scheme.largest is None else largest.new_tensor(scheme.largest)
        largest = whole.expand_as(largest).clone()
    scale = (largest / scheme.qmax).to(torch.float32)
    zero = largest == 0
    if bool(((scale < _SMALLEST) & ~zero).any()):
        return None
    scale[zero] = 1.0
    return scale


def least_error_scales(rows: Tensor, scheme: Scheme, energies: Tensor | None = None) -> Tensor:
    """Returns a scale for each block of columns of the float weight `rows` (out, in), as powers of two, float32 (out,
    blocks). Of two scales, each block takes the one with the smaller squared error: the smallest scale at which no code
    is clamped, or the one of `block_scales` with `clamping`, at which codes between 448 and 512 are clamped to 448.
    `energies` (in,) weighs the error of each column; None: all are equal."""
    assert scheme.block is not None
    blocks = rows.unflatten(1, (-1, scheme.block))
    largest = blocks.abs().amax(2)
    scale, clamping = block_scales(largest), block_scales(largest, clamping=True)
    weighing = 1.0 if energies is None else energies.to(rows.dtype).view(1, -1, scheme.block)

    def error(scales: Tensor) -> Tensor:
        step = scales.to(rows.dtype).unsqueeze(2)
        return ((scheme.nearest_(blocks / step) * step - blocks).square_() * weighing).sum(2)

    return torch.where(error(clamping) < error(scale), clamping, scale)


def check_finite_tensor(name: str, tensor: Tensor) -> None:
    """Raises NumbersError if the tensor called `name` contains NaN or infinities. To be called before a tensor is
    written, because the message says that the tensor was not written."""
    if not finite(tensor):
        raise NumbersError(
            f"{name}: was not written, because it has values that are not finite. Check the model's files."
        )
