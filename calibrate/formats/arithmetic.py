"""Computes a checkpoint's layers in whole numbers, as the Ascend device does, and compares their output with the output
of the dequantized layers in floating point.

Importing this module needs no torch. Whole numbers are stored as float64, which holds sums of products of codes
exactly, because such a sum is at most 2**14 times the number of a layer's inputs, far below 2**53.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from octavo.capture.arrays import Array

from ..layers.schemes import BLOCK
from . import e4m3
from .integers import Integers

_ROWS = 4  # rows of random input, with a fixed seed, that each layer is computed on
_DEQ_ERROR = 2.0**-11  # largest relative rounding error of deq_scale: the device uses 10 bits of its mantissa
_FLOAT_ERROR = 2.0**-22  # relative rounding error of four float32 operations, 2**-24 each
_HALF = 0.51  # largest rounding error of quant_bias, in steps of the accumulator: 0.5, and 2 % for float arithmetic
_UNIT = 2.0**-24  # largest relative rounding error of a float32 operation
_SMALLEST = 2.0**-126  # the smallest normal float32


class ErrorRatios(NamedTuple):
    """The errors of a layer's deq and quant_bias, each divided by the largest error that rounding can cause. A ratio
    above 1.0 is a fault.

    `scales` is the ratio for deq, which should equal input scale times weight scale. A W8A8_DYNAMIC layer has no deq;
    its `scales` is the ratio for the difference between its outputs computed in float32 and in float64. The same holds
    for a W8A8_MXFP8 layer. `bias` is the ratio for quant_bias, which should have the effect of the float bias and the
    zero point; 0.0 for these two kinds of layers, which have no quant_bias. `scales` and `bias` are 0.0 for a W8A16
    layer, which computes no integer sums.
    """

    scales: float
    bias: float


@np.errstate(all="ignore")  # damaged numbers overflow
def error_ratios(layer: Integers) -> ErrorRatios:
    """Returns the errors of a layer's deq and quant_bias, each divided by the largest error that rounding can cause.

    The device computes int8 codes q of the input (npu_quantize), and then the output of each channel n
    (npu_quant_matmul):

        y[n] = (sum over k of q[k] * weight[n, k] + quant_bias[n]) * deq[n]

    The error of deq is its difference from input scale * weight scale. The error of quant_bias is the difference
    between y[n] and the same output computed from the float bias and the zero point:

        (sum over k of (q[k] - zero_point) * weight[n, k]) * deq[n] + bias[n]

    Both outputs are computed in float64 for each timestep bin, from the same random codes with a fixed seed. For a
    convolution they are computed at a single output position.
    """
    if layer.blocks:
        return ErrorRatios(_block_error_ratio(layer), 0.0)
    if layer.dynamic:
        return ErrorRatios(_dynamic_error_ratio(layer), 0.0)
    if not layer.ranged:
        return ErrorRatios(0.0, 0.0)
    weight = layer.rows.astype(np.float64)  # (out, in)
    codes = np.random.default_rng(0).integers(-128, 128, (_ROWS, weight.shape[1])).astype(np.float64)
    total, sums, scale = codes @ weight.T, weight.sum(1), layer.weight_scale.astype(np.float64)  # (rows, out), (out,)
    worst = ErrorRatios(0.0, 0.0)
    for input_scale, zero_point, deq, quant_bias in _bins(layer):
        output = (total + quant_bias) * deq
        exact = (total - zero_point * sums) * deq + layer.float_bias
        product = input_scale * scale
        # the deq of a channel of zero weights scales the bias alone, and is not the product
        scales = (np.abs(deq - product) / (1.01 * _DEQ_ERROR * product))[weight.any(1)]
        biases = np.abs(output - exact) / (_HALF * deq)
        worst = ErrorRatios(max(worst.scales, _largest(scales)), max(worst.bias, _largest(biases)))
    return worst


def _largest(values: Array) -> float:
    return float(values.max()) if values.size else 0.0


def _bins(layer: Integers) -> Iterator[tuple[Array, Array, Array, Array]]:
    """Yields input scale, zero point, deq (the factor of the integer sum) and quant_bias (added to the sum) of each
    timestep bin, an interval of noise levels, in float64. A static layer has one bin."""
    assert layer.input_scale is not None
    assert layer.zero_point is not None
    assert layer.deq is not None
    assert layer.quant_bias is not None
    outputs = len(layer.weight)
    arrays = (
        layer.input_scale.reshape(-1), layer.zero_point.reshape(-1),
        layer.deq.reshape(-1, outputs), layer.quant_bias.reshape(-1, outputs),
    )  # fmt: skip
    return zip(*(array.astype(np.float64) for array in arrays), strict=True)


def has_bias_correction(layer: Integers) -> bool:
    """Returns whether a layer's quant_bias, the int32 numbers that are added to the sums of products, contain a bias
    correction. Without one they contain only the float bias and the effect of the zero point. Returns False for a layer
    that has no quant_bias."""
    return layer.ranged and _correction(layer) > _HALF


def correction_ratio(layer: Integers) -> float:
    """Returns the largest absolute bias correction in a layer's quant_bias, divided by the largest sum of products that
    the layer can have. If the ratio is above 1.0, quant_bias is wrong, because no bias correction is so large.

    The largest sum is 255 * 127 times the number of inputs of an output channel: a code of the input differs from the
    zero point by at most 255, and a code of the weight from 0 by at most 127.
    """
    return _correction(layer) / (255 * 127 * layer.rows.shape[1])


@np.errstate(all="ignore")
def _correction(layer: Integers) -> float:
    """Returns the largest absolute bias correction in a layer's quant_bias: the difference between quant_bias and the
    value that the float bias and the zero point alone would give it. Like quant_bias, it is in the unit of the int32
    sum."""
    sums = layer.rows.sum(1, dtype=np.int64)
    return max(
        _largest(np.abs(quant_bias + zero_point * sums - layer.float_bias / deq))
        for _, zero_point, deq, quant_bias in _bins(layer)
    )


def _dynamic_error_ratio(layer: Integers) -> float:
    """Returns the largest difference between a W8A8_DYNAMIC layer's output in float32 and in float64, divided by the
    largest difference that rounding can cause. The inputs are random with a fixed seed."""
    x = np.random.default_rng(0).standard_normal((_ROWS, layer.rows.shape[1]), np.float32)
    token = np.abs(x).max(1, keepdims=True) / np.float32(127)
    total = np.rint(x / token).astype(np.float64) @ layer.rows.T.astype(np.float64)
    output = total.astype(np.float32) * (token * layer.weight_scale)
    exact = total * token.astype(np.float64) * layer.weight_scale.astype(np.float64)
    rounding = _FLOAT_ERROR * np.abs(exact)
    if layer.bias is not None:
        output = output + layer.bias.astype(np.float32)
        exact, rounding = exact + layer.float_bias, rounding + _FLOAT_ERROR * np.abs(layer.float_bias)
    return _largest(np.abs(output - exact) / (rounding + _SMALLEST))


@np.errstate(all="ignore")  # damaged numbers overflow
def _block_error_ratio(layer: Integers) -> float:
    """Returns the largest difference between a W8A8_MXFP8 layer's output in float32 and in float64, divided by the
    largest difference that rounding can cause; infinity if an output is outside float32. The inputs are random with a
    fixed seed, and become codes as in Ascend's npu_dynamic_mx_quant."""
    inputs = layer.weight.shape[1]
    x = e4m3.in_blocks(np.random.default_rng(0).standard_normal((_ROWS, inputs)), BLOCK)
    scale = np.ldexp(1.0, layer.weight_scale.astype(np.int32) - 127)
    weight = e4m3.VALUES[layer.weight].astype(np.float64) * scale.repeat(BLOCK, 1)
    exact = x @ weight.T + layer.float_bias
    output = x.astype(np.float32) @ weight.astype(np.float32).T + layer.float_bias.astype(np.float32)
    sizes = np.abs(x) @ np.abs(weight).T + np.abs(layer.float_bias)
    ratios = np.abs(output - exact) / ((inputs + 2) * _UNIT * sizes + _SMALLEST)
    return float("inf") if not np.isfinite(output).all() else _largest(ratios)
