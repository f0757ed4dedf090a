"""Computes a checkpoint's layers as the device does, in whole numbers, and compares the result with floating point.

Importing this module needs no torch. Whole numbers are in float64, where sums of products of codes are exact: 2**14
times the inputs of a layer is far below 2**53.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from octavo.capture.arrays import Array

from .integers import Integers

_ROWS = 4  # rows of seeded input that each layer is computed on
_DEQ_ERROR = 2.0**-11  # largest relative rounding of deq_scale: the device reads 10 bits of its mantissa
_FLOAT_ERROR = 2.0**-22  # relative error of a few float32 operations, of 2**-24 each
_HALF = 0.51  # largest rounding of quant_bias, in steps of the accumulator: half, and 2 % for float arithmetic
_SMALLEST = 2.0**-126  # the smallest normal float32


class Shares(NamedTuple):
    """The distance of the integers from floating point, in shares of what rounding explains: up to 1.0 is sound.

    `scales`: of deq from the product of the scales, or of a W8A8_DYNAMIC output from float64. `bias`: of quant_bias
    from the bias. 0.0 where a layer has no such numbers.
    """

    scales: float
    bias: float


@np.errstate(all="ignore")  # damaged numbers overflow
def shares(layer: Integers) -> Shares:
    """Compares the output of the integers with that of the dequantized weights and inputs.

    npu_quantize gives codes q of int8, npu_quant_matmul (sum_k q[k] * weight[n, k] + quant_bias[n]) * deq[n]; here on
    seeded codes, in float64, for each bin of noise levels. A convolution is computed at one position.
    """
    if layer.dynamic:
        return Shares(_dynamic_share(layer), 0.0)
    if not layer.ranged:
        return Shares(0.0, 0.0)
    weight = layer.rows.astype(np.float64)  # (out, in)
    codes = np.random.default_rng(0).integers(-128, 128, (_ROWS, weight.shape[1])).astype(np.float64)
    total, sums, scale = codes @ weight.T, weight.sum(1), layer.weight_scale.astype(np.float64)  # (rows, out), (out,)
    worst = Shares(0.0, 0.0)
    for input_scale, zero_point, deq, quant_bias in _bins(layer):
        made = (total + quant_bias) * deq
        exact = (total - zero_point * sums) * deq + layer.added
        product = input_scale * scale
        scales = (np.abs(deq - product) / (1.01 * _DEQ_ERROR * product))[weight.any(1)]  # others scale a bias alone
        biases = np.abs(made - exact) / (_HALF * deq)
        worst = Shares(max(worst.scales, _largest(scales)), max(worst.bias, _largest(biases)))
    return worst


def _largest(values: Array) -> float:
    return float(values.max()) if values.size else 0.0


def _bins(layer: Integers) -> Iterator[tuple[Array, Array, Array, Array]]:
    """Yields input scale, zero point, deq and quant_bias in float64 of each bin of noise levels; a static layer has
    one."""
    assert layer.input_scale is not None
    assert layer.zero_point is not None
    assert layer.deq is not None
    assert layer.quant_bias is not None
    outputs = len(layer.weight)
    each = (
        layer.input_scale.reshape(-1), layer.zero_point.reshape(-1),
        layer.deq.reshape(-1, outputs), layer.quant_bias.reshape(-1, outputs),
    )  # fmt: skip
    return zip(*(rows.astype(np.float64) for rows in each), strict=True)


def corrected(layer: Integers) -> bool:
    """Whether quant_bias carries more than the layer's own bias."""
    return layer.ranged and _residue(layer) > _HALF


def correction_share(layer: Integers) -> float:
    """The largest correction that quant_bias carries, as a share of the largest sum that such a layer can have."""
    return _residue(layer) / (255 * 127 * layer.rows.shape[1])


@np.errstate(all="ignore")
def _residue(layer: Integers) -> float:
    """The largest difference of quant_bias from the quant_bias of the layer's own bias, in steps of the accumulator."""
    sums = layer.rows.sum(1, dtype=np.int64)
    return max(
        _largest(np.abs(quant_bias + zero_point * sums - layer.added / deq))
        for _, zero_point, deq, quant_bias in _bins(layer)
    )


def _dynamic_share(layer: Integers) -> float:
    """Compares the output of a W8A8_DYNAMIC layer in float32 with float64."""
    x = np.random.default_rng(0).standard_normal((_ROWS, layer.rows.shape[1]), np.float32)
    token = np.abs(x).max(1, keepdims=True) / np.float32(127)
    total = np.rint(x / token).astype(np.float64) @ layer.rows.T.astype(np.float64)
    made = total.astype(np.float32) * (token * layer.weight_scale)
    exact = total * token.astype(np.float64) * layer.weight_scale.astype(np.float64)
    rounding = _FLOAT_ERROR * np.abs(exact)
    if layer.bias is not None:
        made = made + layer.bias.astype(np.float32)
        exact, rounding = exact + layer.added, rounding + _FLOAT_ERROR * np.abs(layer.added)
    return _largest(np.abs(made - exact) / (rounding + _SMALLEST))
