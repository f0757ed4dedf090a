"""Transforms: linear maps applied to a layer's input before it becomes codes, while the weight carries the inverse map.

A transform is an immutable object of one of the types in TRANSFORMS; None stands for no transform.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor

from ..native.kernels import kernels_for
from .schemes import ROTATIONS


class Transform(Protocol):
    """Maps the channels of a layer's input x by an invertible linear map T. The weight W becomes W T^-1, so the product
    stays the same: W x = (W T^-1) (T x).

    T is stored as one or two tensors, which the property `tensors` returns. TENSORS are the names of these tensors in a
    layer's state dict. `by_channel` is True if T only scales each channel by a positive factor and mixes no channels.
    """

    TENSORS: ClassVar[tuple[str, ...]]  # the names of the transform's tensors in a layer's state dict
    by_channel: ClassVar[bool]  # True if channel i of T x rises with channel i of x and depends on no other

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor | None]) -> Self:
        """Makes the transform from `tensors`, a dict from name to tensor that has a tensor for each name in TENSORS;
        other entries are ignored."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the transform: a dict with the names in TENSORS as keys."""

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Returns the transform with its tensors on `device` and in `dtype`, the dtype of the float layer."""

    def fault(self) -> str | None:
        """Returns the reason why the transform cannot be inverted in its dtype; None where it can."""

    def input(self, x: Tensor, axis: int = -1) -> Tensor:
        """Returns the input `x` after the transform, rounded to the dtype of `x`. The channels are along `axis`, a
        negative number."""

    def weight(self, weight: Tensor) -> Tensor:
        """Returns the weight for the transformed input, W T^-1 in float32, where W is the float `weight`, (out, in) or
        that of a convolution, and T the linear map of the transform."""


@dataclass(frozen=True)
class Multiply:
    """Multiplies channel i of the input by the positive number factors[i], which is one over the channel's smoothing
    factor (SmoothQuant). `factors` is (in,). The weight is (out, in), or (out, in / groups, height, width) for a
    convolution, whose padding with zeros stays zero."""

    TENSORS: ClassVar[tuple[str, ...]] = ("mul_scale",)
    by_channel: ClassVar[bool] = True
    factors: Tensor

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor | None]) -> Self:
        factors = tensors["mul_scale"]
        assert factors is not None
        return cls(factors)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"mul_scale": self.factors}

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        return type(self)(self.factors.detach().to(device, dtype))

    def fault(self) -> str | None:
        sound = bool(((self.factors > 0) & self.factors.isfinite()).all())
        return None if sound else "cannot hold the multiplier of its input"

    def input(self, x: Tensor, axis: int = -1) -> Tensor:
        return x * self.factors.to(x.dtype).view([-1] + [1] * (-1 - axis))

    def weight(self, weight: Tensor) -> Tensor:
        groups = len(self.factors) // weight.shape[1]
        factors = self.factors.to(torch.float32).view(groups, 1, -1, *[1] * (weight.ndim - 2))
        return (weight.to(torch.float32).unflatten(0, (groups, -1)) / factors).flatten(0, 1)


@dataclass(frozen=True)
class Rotate:
    """Rotates each group of neighbouring channels by a regular Hadamard matrix, which divides an outlier among all
    channels of the group (ConvRot, Huang et al., arXiv 2512.03673, 2025).

    The matrix of a group of 16, 64 or 256 channels is a Kronecker power of H4 = [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1,
    1, 1], [-1, 1, 1, 1]] / 2. The matrix is symmetric and its own inverse. `rotation` (factors,) int32 has the order of
    each Kronecker factor, which is always 4: three factors stand for groups of 64 channels.
    """

    TENSORS: ClassVar[tuple[str, ...]] = ("rotation",)
    by_channel: ClassVar[bool] = False
    rotation: Tensor

    @classmethod
    def by(cls, size: int) -> Self:
        """Makes the rotation of groups of `size` channels: 16, 64 or 256."""
        return cls(torch.full((ROTATIONS[size],), 4, dtype=torch.int32, device="cpu"))

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor | None]) -> Self:
        rotation = tensors["rotation"]
        assert rotation is not None
        return cls(rotation)

    @property
    def size(self) -> int:
        """The number of channels of a group."""
        return 4 ** len(self.rotation)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"rotation": self.rotation}

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        return type(self)(self.rotation.to(device))

    def fault(self) -> str | None:
        return None

    def input(self, x: Tensor, axis: int = -1) -> Tensor:
        return _rotated(x.movedim(axis, -1), self.size).movedim(-1, axis)

    def weight(self, weight: Tensor) -> Tensor:
        return self.input(weight.to(torch.float32))


@dataclass(frozen=True)
class MultiplyRotate:
    """Multiplies each channel of the input by a factor, as `multiply` says, and rotates the result, as `rotate`
    says."""

    TENSORS: ClassVar[tuple[str, ...]] = (*Multiply.TENSORS, *Rotate.TENSORS)
    by_channel: ClassVar[bool] = False
    multiply: Multiply
    rotate: Rotate

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor | None]) -> Self:
        return cls(Multiply.of(tensors), Rotate.of(tensors))

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self.multiply.tensors | self.rotate.tensors

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        return type(self)(self.multiply.to(device, dtype), self.rotate.to(device, dtype))

    def fault(self) -> str | None:
        return self.multiply.fault()

    def input(self, x: Tensor, axis: int = -1) -> Tensor:
        return self.rotate.input(self.multiply.input(x, axis), axis)

    def weight(self, weight: Tensor) -> Tensor:
        return self.rotate.weight(self.multiply.weight(weight))


# a layer has the first of these transforms all of whose tensors it has
TRANSFORMS: tuple[type[Transform], ...] = (MultiplyRotate, Multiply, Rotate)


def _rotated(x: Tensor, size: int) -> Tensor:
    """Returns `x` (..., channels) with each group of `size` channels rotated. Computes in float32, or in float64 if `x`
    is float64, and rounds once to the dtype of `x`.

    Each pass multiplies by one factor H4 of the rotation (see `Rotate`), which turns four numbers a, b, c, d of a group
    into s - d, s - c, s - b, s - a, where s is half of their sum. So a group of 256 channels takes 4 passes instead of
    a product with a matrix.
    """
    if not torch.compiler.is_compiling() and (kernels := kernels_for(x)):
        return kernels.rotate(x, size)
    y = x if x.dtype == torch.float64 else x.to(torch.float32)
    stride = 1
    while stride < size:
        a, b, c, d = (part := y.unflatten(-1, (-1, 4, stride))).unbind(-2)
        half = ((a + b) + (c + d)) * 0.5
        y = (half.unsqueeze(-2) - part.flip(-2)).flatten(-3)
        stride *= 4
    return y.to(x.dtype)


def without_multiplier(transform: Transform | None) -> Transform | None:
    """Returns what remains of `transform` without its multiplication of channels: the rotation of a MultiplyRotate;
    None for a Multiply."""
    return transform.rotate if isinstance(transform, MultiplyRotate) else None


def transformed(transform: Transform | None, x: Tensor, axis: int = -1) -> Tensor:
    """Returns the input `x` after `transform`, or `x` itself where `transform` is None. The channels are along `axis`,
    a negative number."""
    return x if transform is None else transform.input(x, axis)


def transformed_patches(transform: Transform | None, rows: Tensor, taps: int) -> Tensor:
    """Returns `rows` (rows, in * taps) after `transform`. For a linear layer, they are rows of its input, and `taps` is
    1. For a convolution, they are patches of its input, and each channel has `taps` neighbouring columns, one for each
    place of the kernel (height times width)."""
    if transform is None or taps == 1:
        return transformed(transform, rows)
    return transform.input(rows.unflatten(-1, (-1, taps)), -2).flatten(-2)


def same_transform(one: Transform | None, other: Transform | None) -> bool:
    """Returns whether `one` and `other` map every input to the same values. None stands for no transform."""
    if one is None or other is None or type(one) is not type(other):
        return one is other
    return all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())


def weight_for(transform: Transform | None, weight: Tensor) -> Tensor:
    """Returns the weight that gives the layer's output from the transformed input: `weight` with the inverse of
    `transform` applied, or `weight` itself where `transform` is None."""
    return weight.detach() if transform is None else transform.weight(weight.detach())
