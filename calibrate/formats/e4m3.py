"""Reads and makes codes of the FP8 type e4m3 in numpy, for checks of checkpoints. Importing this module needs no torch.

The type is that of the OCP 8-bit Floating Point Specification, 2023: a sign bit, four bits of exponent with the bias 7,
and three bits of mantissa. It has no infinities; its largest number is 448.
"""

import numpy as np

from octavo.capture.arrays import Array

LARGEST = 448.0
_LARGEST_EXPONENT = 8  # floor of log2 of LARGEST
_SMALLEST_EXPONENT = -6  # of normal numbers
_MANTISSA = 3  # bits
_NAN = 0x7F  # all bits but the sign


def _value(bits: int) -> float:
    """Returns the number that eight bits stand for."""
    exponent, mantissa = (bits >> _MANTISSA) & 15, bits & 7
    if bits & _NAN == _NAN:
        return float("nan")
    size = (8 + mantissa) * 2.0 ** (exponent - 10) if exponent else mantissa * 2.0**-9
    return -size if bits & 0x80 else size


VALUES = np.array([_value(bits) for bits in range(256)], np.float32)  # the number of each code, by its bits


def is_nan(bits: Array) -> Array:
    """Returns for each of `bits`, codes as uint8, whether the code stands for no number."""
    return (bits & _NAN) == _NAN


def rounded(x: Array) -> Array:
    """Returns the numbers of e4m3 nearest to `x`, ties to even mantissas, in the dtype of `x`. Numbers beyond 448
    become 448, and those below -448 become -448."""
    exponent = np.maximum(np.frexp(x)[1] - 1, _SMALLEST_EXPONENT)
    step = np.ldexp(np.ones_like(x), exponent - _MANTISSA)
    return np.clip(np.rint(x / step) * step, -LARGEST, LARGEST)


def in_blocks(x: Array, block: int) -> Array:
    """Returns the float64 numbers that the codes of `x` (rows, channels) stand for, if each `block` channels share a
    power of two as Ascend's npu_dynamic_mx_quant chooses it: its exponent is floor(log2(largest absolute value in the
    block)) - 8, where 8 is the exponent of the largest code, 448. Codes that would be larger become 448."""
    blocks = x.astype(np.float64).reshape(len(x), -1, block)
    exponent = np.frexp(np.abs(blocks).max(2, keepdims=True))[1] - 1 - _LARGEST_EXPONENT
    scale = np.ldexp(1.0, exponent)
    return (rounded(blocks / scale) * scale).reshape(x.shape)
