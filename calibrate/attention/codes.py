"""Makes the codes of query, key and value as the kernels of quantized attention do, and returns the numbers that the
codes stand for.

All functions have an argument `x` (batch, heads, tokens, channels), and return the codes times their scales in
float32, in the same shape. Tokens and channels that are missing in the last block of a kernel are zeros there, so they
do not change a scale.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers.scheme import FP8, INT8, MXFP8, block_scales

_COLUMNS = 128  # channels that share a scale in MindIE-SD's npu_dynamic_block_quant(col_block_size=128)
_LEAST = 1e-7  # added to the scales of queries and keys in comfy-kitchen's kernel
_LEAST_VALUE = 1e-12  # smallest scale of values in comfy-kitchen's kernel


def fp8_blocks(x: Tensor, tokens: int) -> Tensor:
    """Rounds `x` (batch, heads, tokens, channels) to codes of e4m3, with a float32 scale for each block of `tokens`
    tokens and 128 channels of a head. The scale makes the block's largest magnitude the code 448. Returns code times
    scale."""
    padded = _padded(_padded(x.to(torch.float32), -2, tokens), -1, min(_COLUMNS, x.shape[-1]))
    blocks = padded.unflatten(-1, (-1, min(_COLUMNS, x.shape[-1]))).unflatten(-3, (-1, tokens))
    scale = blocks.abs().amax((-3, -1), keepdim=True) / FP8.highest
    codes = FP8.round_(blocks / scale.masked_fill(scale == 0, 1.0))
    return (codes * scale).flatten(-4, -3).flatten(-2)[..., : x.shape[-2], : x.shape[-1]]


def mx_channels(x: Tensor) -> Tensor:
    """Rounds `x` (batch, heads, tokens, channels) to codes of e4m3, in which 32 neighbouring channels of a token share
    a power of two as their scale. The scale is that of Ascend's npu_dynamic_mx_quant, with which the largest code may
    be clamped. Returns code times scale."""
    assert MXFP8.block is not None
    blocks = _padded(x.to(torch.float32), -1, MXFP8.block).unflatten(-1, (-1, MXFP8.block))
    scale = block_scales(blocks.abs().amax(-1, keepdim=True), clamping=True)
    return (MXFP8.round_(blocks / scale) * scale).flatten(-2)[..., : x.shape[-1]]


def mx_tokens(x: Tensor) -> Tensor:
    """Rounds `x` (batch, heads, tokens, channels) to codes of e4m3, in which 32 consecutive tokens of a channel share a
    power of two as their scale. The tokens of all batch items follow one another, as in MindIE-SD, so a block may hold
    tokens of two items. Returns code times scale."""
    tokens = x.transpose(0, 1).flatten(1, 2)  # (heads, batch * tokens, channels)
    coded = mx_channels(tokens.transpose(-1, -2)).transpose(-1, -2)
    return coded.unflatten(1, (x.shape[0], -1)).transpose(0, 1)


def int8_queries(x: Tensor, warp: int) -> Tensor:
    """Rounds `x` (batch, heads, tokens, channels) to int8 codes. In each block of `warp` tokens, every eighth token
    shares one scale: with 32, tokens 0, 8, 16 and 24 have one, tokens 1, 9, 17 and 25 another. Returns code times
    scale."""
    blocks = _padded(x.to(torch.float32), -2, warp).unflatten(-2, (-1, warp // 8, 8))
    return _int8(blocks, (-3, -1)).flatten(-4, -2)[..., : x.shape[-2], :]


def int8_keys(x: Tensor, tile: int) -> Tensor:
    """Rounds `x` (batch, heads, tokens, channels) to int8 codes. Each block of `tile` tokens has four scales: one for
    tokens 0, 1, 8, 9, 16, 17 and so on, the next for tokens 2, 3, 10, 11 and so on. Returns code times scale."""
    blocks = _padded(x.to(torch.float32), -2, tile).unflatten(-2, (-1, tile // 8, 4, 2))
    return _int8(blocks, (-4, -2, -1)).flatten(-5, -2)[..., : x.shape[-2], :]


def int8_values(x: Tensor) -> Tensor:
    """Rounds `x` (batch, heads, tokens, channels) to int8 codes, with one scale for each channel of a head. Returns
    code times scale."""
    values = x.to(torch.float32)
    scale = (values.abs().amax(-2, keepdim=True) / INT8.highest).clamp_min(_LEAST_VALUE)
    return (values * scale.reciprocal()).round_() * scale


def _int8(blocks: Tensor, shared: tuple[int, ...]) -> Tensor:
    """Rounds `blocks` to int8 codes; numbers that differ only in their positions along the axes `shared` have one
    scale. Returns code times scale."""
    scale = blocks.abs().amax(shared, keepdim=True) / INT8.highest + _LEAST
    return (blocks / scale).round_() * scale


def _padded(x: Tensor, axis: int, multiple: int) -> Tensor:
    """Returns `x` with zeros at the end of `axis`, -1 or -2, so that its length is a multiple of `multiple`."""
    missing = -x.shape[axis] % multiple
    return F.pad(x, (0, 0) * (-1 - axis) + (0, missing)) if missing else x
