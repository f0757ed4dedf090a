"""Defines the four ways to treat the input of an integer layer. The input becomes codes with one range known beforehand
(static); with one known range for each timestep bin; or with a range for each token, found when the layer runs
(dynamic). Or the input stays float (weight-only).

Each way is a type, and everything that depends on the way is an attribute or method of its type.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from .noise_level import bins_of
from .products import dynamic_codes
from .scheme import (
    ACTIVATION,
    ELEMENT_TYPES,
    INT8,
    SYMMETRIC_ACTIVATION,
    WEIGHT,
    Element,
    QParams,
    Scheme,
    codes,
    dequantize,
)
from .schemes import NAMES


class Codes(NamedTuple):
    """Codes `q` in float32, which stand for (q - zero_point) * scale; a `zero_point` of None means 0. `scale` and
    `zero_point` are 0-d, or have a shape that broadcasts against `q`."""

    q: Tensor
    scale: Tensor
    zero_point: Tensor | None


def weights_for(scheme: Scheme) -> Scheme:
    """Returns the rule (`Scheme`) for the weights of a layer whose input becomes codes by the rule `scheme`: symmetric,
    without the lowest integer, and of the same element type. Each output channel has a scale of its own, or, if
    `scheme.per_tensor` is True, all have the same one."""
    if scheme.element == WEIGHT.element and not scheme.per_tensor:
        return WEIGHT
    return replace(
        WEIGHT, element=scheme.element, per_tensor=scheme.per_tensor, largest=scheme.largest, clamping=scheme.clamping
    )


@dataclass(frozen=True)
class Input:
    """Base of the ways in which the input of a layer becomes codes.

    |           | StaticInput | TimestepInput           | DynamicInput  | FloatInput  | meaning                        |
    |-----------|-------------|-------------------------|---------------|-------------|--------------------------------|
    | name      | W8A8        | W8A8_TIMESTEP           | W8A8_DYNAMIC  | W8A16       | in reports and files, for int8 |
    |           |             |                         |               |             | (`scheme_name`)                |
    | rounded   | yes         | yes                     | yes           | no          | the input becomes codes        |
    | ranged    | yes         | yes                     | no            | no          | ranges are known beforehand    |
    | by_level  | no          | yes                     | no            | no          | ranges depend on noise level   |
    | by_patch  | yes         | no                      | no            | yes         | a piece of an image can be     |
    |           |             |                         |               |             | quantized without the rest and |
    |           |             |                         |               |             | without a noise level          |

    `scheme`, a `Scheme` and not a name such as W8A8, is the rule for the input's codes; dynamic and float inputs use
    only its `element`, the set of numbers that codes are taken from. TENSORS are the names, in a layer's state dict, of
    the tensors that turn the input into codes, such as a scale."""

    rounded: ClassVar[bool] = True
    ranged: ClassVar[bool] = False
    by_level: ClassVar[bool] = False
    by_patch: ClassVar[bool] = False
    TENSORS: ClassVar[tuple[str, ...]] = ()
    scheme: Scheme = field(default=ACTIVATION, kw_only=True)

    @property
    def weights(self) -> Scheme:
        """The rule (`Scheme`) by which the layer's weight becomes codes."""
        return weights_for(self.scheme)

    @property
    def integer_bias(self) -> bool:
        """Whether the layer adds its bias to the integer sum, as quant_bias; otherwise it adds a float bias to the
        output."""
        return self.ranged and self.scheme.element.integer

    @property
    def name(self) -> str:
        """The name of the layer's scheme in reports and files, such as W8A8."""
        return scheme_name(type(self), self.scheme.element)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor | None], scheme: Scheme) -> Self:
        """Makes an input of this class from a layer's `tensors`, a dict from name to tensor. The dict must have the
        names in the attribute TENSORS of the class, such as "input_scale", and may have more. `scheme` is the rule for
        the input's codes."""
        return cls(scheme=scheme)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that turn the input into codes: a dict from name, such as "input_scale", to tensor. Its keys are
        the names in the attribute TENSORS of the class."""
        return {}

    def codes(self, x: Tensor, level: float | None = None, axes: tuple[int, ...] = (-1,)) -> Codes:
        """Returns the codes of `x`, with their scale and zero point. `level` is the noise level of the denoiser's call,
        which selects the range of a TimestepInput; None stands for 0. A DynamicInput computes a scale from the largest
        absolute value along `axes` of `x`, by default one for each token. Raises NotImplementedError for a FloatInput,
        which has no codes."""
        raise NotImplementedError

    def represented(self, x: Tensor, level: float | None = None) -> Tensor:
        """Returns the float32 values that the codes of `x` (rows, in) float32 stand for; a FloatInput returns `x`
        itself. `level` is the noise level of the denoiser's call, on which the range of a TimestepInput depends."""
        q, scale, zero_point = self.codes(x, level)
        zero_point = torch.zeros_like(scale) if zero_point is None else zero_point
        return dequantize(q, QParams(scale, zero_point), self.scheme)


@dataclass(frozen=True)
class StaticInput(Input):
    """Quantizes all inputs with one range, whose scale and zero point are `qparams`, 0-d.

    In a call with several noise levels, `TimestepInput.in_bins` makes a StaticInput with a range for each row of the
    input. Scale and zero point then have a first axis of rows.
    """

    ranged = by_patch = True
    TENSORS = ("input_scale", "input_zero_point")
    qparams: QParams

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor | None], scheme: Scheme) -> Self:
        return cls(_qparams(tensors), scheme=scheme)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return dict(zip(self.TENSORS, self.qparams, strict=True))

    def codes(self, x: Tensor, level: float | None = None, axes: tuple[int, ...] = (-1,)) -> Codes:
        qparams = QParams(*(parameter.to(x.device) for parameter in self.qparams))
        return Codes(codes(x, qparams, self.scheme), *qparams)


@dataclass(frozen=True)
class TimestepInput(Input):
    """Quantizes with one range for each timestep bin, an interval of noise levels. `qparams` are the scales and zero
    points, (bins,).

    `edges`, float32 (bins - 1,) and ascending, are the noise levels that separate the bins. A call belongs to the bin
    whose index is the number of edges less than or equal to the call's noise level.
    """

    ranged = by_level = True
    TENSORS = ("input_scale", "input_zero_point", "edges")
    qparams: QParams
    edges: Tensor

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor | None], scheme: Scheme) -> Self:
        edges = tensors["edges"]
        assert edges is not None
        return cls(_qparams(tensors), edges, scheme=scheme)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return dict(zip(self.TENSORS, (*self.qparams, self.edges), strict=True))

    def in_bins(self, bins: Tensor) -> StaticInput:
        """Returns a StaticInput with the range of the bin whose index is `bins`, 0-d. If `bins` is (rows,), with an
        index for each row of the layer's input, scale and zero point of the StaticInput are (rows,) too."""
        scale, zero_point = self.qparams
        return StaticInput(QParams(scale[bins], zero_point[bins]), scheme=self.scheme)

    def codes(self, x: Tensor, level: float | None = None, axes: tuple[int, ...] = (-1,)) -> Codes:
        return self.in_bins(
            bins_of(torch.tensor(0.0 if level is None else level, dtype=torch.float32), self.edges)
        ).codes(x)


@dataclass(frozen=True)
class DynamicInput(Input):
    """Quantizes each token, or each image if the layer is a convolution, with a symmetric range of its own, computed
    when the layer runs."""

    def codes(self, x: Tensor, level: float | None = None, axes: tuple[int, ...] = (-1,)) -> Codes:
        return Codes(*dynamic_codes(x, axes, self.weights), None)


@dataclass(frozen=True)
class FloatInput(Input):
    """The input stays float; only the weight is quantized."""

    rounded = False
    by_patch = True

    def represented(self, x: Tensor, level: float | None = None) -> Tensor:
        return x


def _qparams(tensors: Mapping[str, Tensor | None]) -> QParams:
    scale, zero_point = tensors["input_scale"], tensors["input_zero_point"]
    assert scale is not None
    assert zero_point is not None
    return QParams(scale, zero_point)


# the name of each input type on the command line
ACTIVATIONS: dict[str, type[Input]] = {
    "static": StaticInput, "timestep": TimestepInput, "dynamic": DynamicInput, "float": FloatInput
}  # fmt: skip
_WAYS = {kind: way for way, kind in ACTIVATIONS.items()}


def scheme_name(kind: type[Input], element: Element = INT8) -> str:
    """Returns the name of the scheme, such as W8A8_DYNAMIC, of layers whose inputs become codes of the type `element`
    in the way of the class `kind`, such as DynamicInput. Raises KeyError if there is no such scheme, as for StaticInput
    and MXFP8, whose blocks have no ranges known beforehand."""
    return NAMES[element.name][_WAYS[kind]]


# the input type, and the rule for the codes of inputs, by the name of a scheme
INPUTS: dict[str, type[Input]] = {name: ACTIVATIONS[way] for names in NAMES.values() for way, name in names.items()}
RULES: dict[str, Scheme] = {
    name: ACTIVATION if element == INT8.name else replace(SYMMETRIC_ACTIVATION, element=ELEMENT_TYPES[element])
    for element, names in NAMES.items()
    for name in names.values()
}
