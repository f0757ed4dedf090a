"""Defines the types of quantized attention that consumers have, and computes attention of each type in float32.

The weights of a softmax are 8-bit integers in ComfyUI's type, as in its kernel. In MindIE-SD's types they stay float32,
because it is not documented how Ascend's fused kernel rounds them. So real errors may be larger than those measured
here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import codes
from .inputs import Inputs, attended
from .names import COMFY_INT8, FP8, MXFP8
from .rotations import rotation_of, walsh

_LEVELS = 255  # largest code of a weight of the softmax in comfy-kitchen's kernel
_FEW_KEYS = 256  # most keys for which comfy-kitchen's kernel mixes only 4 channels
_MANY_KEYS = 1024  # with more keys, comfy-kitchen's kernel has tiles of 128 keys for wide heads without a mask
_WIDTHS = (64, 128, 256)  # widths of a head in comfy-kitchen's kernel, to which zeros are added


@dataclass
class Facts:
    """The properties of all calls of an attention module that decide which kernels can compute them.

    `batch` is the largest batch, `width` the number of channels of a head of query and key. Four fields are True if any
    call has the property: `masked`, a bias; `scaled`, a scale other than 1 / sqrt(width); `grouped`, key heads that
    several query heads share; `uneven`, a value whose head has another number of channels than the query's.
    `same_length` is True if all calls have as many queries as keys.
    """

    batch: int = 0
    masked: bool = False
    scaled: bool = False
    grouped: bool = False
    uneven: bool = False
    same_length: bool = True
    width: int = 0

    def add(self, inputs: Inputs) -> None:
        """Adds the properties of one call."""
        self.join(
            Facts(
                inputs.query.shape[0], inputs.bias is not None,
                not math.isclose(inputs.scale, inputs.width**-0.5, rel_tol=1e-5), inputs.grouped,
                inputs.value.shape[-1] != inputs.width, inputs.query.shape[-2] == inputs.key.shape[-2], inputs.width,
            )
        )  # fmt: skip

    def join(self, other: "Facts") -> None:
        """Adds the properties of the calls that `other` describes."""
        self.batch, self.width = max(self.batch, other.batch), max(self.width, other.width)
        self.masked, self.scaled = self.masked or other.masked, self.scaled or other.scaled
        self.grouped, self.uneven = self.grouped or other.grouped, self.uneven or other.uneven
        self.same_length = self.same_length and other.same_length


class Kind(NamedTuple):
    """A type of quantized attention.

    `run(inputs, rotated, rows)` returns the output of the query rows at the positions `rows`, float32 (batch, heads,
    rows, width of the value), with query and key rotated if `rotated` is True. `refusal` returns the reason why the
    consumer, the software that loads the checkpoint, does not compute a module with these Facts in this type; None if
    it does. `rotates` is True if the consumer always rotates query and key, so that errors without a rotation do not
    count. `consumer` is the name of the software.
    """

    run: Callable[[Inputs, bool, Tensor], Tensor]
    refusal: Callable[[Facts], str | None]
    rotates: bool
    consumer: str


def _rotated(inputs: Inputs, rotated: bool) -> tuple[Tensor, Tensor]:
    """Returns query and key, multiplied by `rotation_of` in their own dtype if `rotated` is True, as MindIE-SD does."""
    if not rotated:
        return inputs.query, inputs.key
    rotation = rotation_of(inputs.width).to(inputs.query.device, inputs.query.dtype)
    return inputs.query @ rotation, inputs.key @ rotation


def _fp8(inputs: Inputs, rotated: bool, rows: Tensor) -> Tensor:
    query, key = _rotated(inputs, rotated)
    query, key, value = (
        codes.fp8_blocks(x, tokens) for x, tokens in ((query, 128), (key, 256), (inputs.value, 256))
    )  # block sizes of FP8RotateQuantFA
    return attended(query[:, :, rows], key, value, inputs.bias_of(rows), inputs.scale)


def _mxfp8(inputs: Inputs, rotated: bool, rows: Tensor) -> Tensor:
    query, key = (codes.mx_channels(x) for x in _rotated(inputs, rotated))
    value = codes.mx_tokens(inputs.value)
    return attended(query[:, :, rows], key, value, inputs.bias_of(rows), inputs.scale)


def _int8(inputs: Inputs, rotated: bool, rows: Tensor) -> Tensor:
    """Returns the output of the query rows at the positions `rows`, computed as comfy-kitchen's kernel int8_attention
    does, which follows SageAttention (Zhang et al., arXiv 2410.02367, 2024). `rotated` says whether query and key are
    rotated. For heads of 65 to 128 channels the kernel flips signs by a fixed pattern before it rotates; this function
    flips random ones instead."""
    width = next((width for width in _WIDTHS if inputs.width <= width), inputs.width)
    missing, keys = width - inputs.width, inputs.key.shape[-2]
    query, key = (F.pad(x.to(torch.float32), (0, missing)) for x in (inputs.query, _centred(inputs.key)))
    if rotated:
        group = 4 if keys <= _FEW_KEYS else min(width, 128)
        rotation = walsh(width, group, signed=group == width == 128).to(query.device, torch.float32)
        query, key = query @ rotation, key @ rotation
    tile = 128 if width >= 128 and keys > _MANY_KEYS and inputs.bias is None else 64
    query = codes.int8_queries(query, 16 if width == 256 else 32)[:, :, rows]
    scores = query @ codes.int8_keys(key, tile).transpose(-1, -2) * inputs.scale
    bias = inputs.bias_of(rows)
    weights = _in_levels(scores if bias is None else scores + bias, tile)
    total = weights.sum(-1, keepdim=True)
    return weights @ codes.int8_values(inputs.value) / total.masked_fill(total == 0, 1.0)


def _in_levels(scores: Tensor, tile: int) -> Tensor:
    """Returns the weights of a softmax before the division by their sum, times 255: 255 exp(score - largest score of
    the row). In each group of `tile` keys, a weight is rounded to a multiple of 1 / 255 of the group's largest weight.
    `scores` is (..., rows, keys); masked keys have the score -infinity."""
    keys = scores.shape[-1]
    tiles = F.pad(scores, (0, -keys % tile), value=-torch.inf).unflatten(-1, (-1, tile))
    most = tiles.amax(-1, keepdim=True)
    largest = most.amax(-2, keepdim=True)
    levels = ((tiles - most.masked_fill(most == -torch.inf, 0.0)).exp() * _LEVELS).round_()
    return (levels * (most - largest.masked_fill(largest == -torch.inf, 0.0)).exp()).flatten(-2)[..., :keys]


def _centred(key: Tensor) -> Tensor:
    """Returns `key` (batch, heads, keys, width) in float32, in each head minus the vector that comfy-kitchen's kernel
    subtracts from every key. The kernel takes nine evenly spaced keys of the head, and from these the one nearest to
    their mean. It subtracts this key if that lowers the nine's sum of squares and raises their largest magnitude by at
    most an eighth; otherwise nothing. The softmax stays the same, because all scores of a row change by the same
    amount."""
    key = key.to(torch.float32)
    positions = torch.arange(9, device=key.device) * (key.shape[-2] - 1) // 8
    samples = key[:, :, positions]
    distances = (9 * samples - samples.sum(-2, keepdim=True)).square().sum(-1, keepdim=True)
    index = distances.argmin(-2, keepdim=True).expand(*samples.shape[:2], 1, samples.shape[-1])
    anchor = samples.gather(-2, index)
    rest = samples - anchor
    lower = rest.square().sum((-2, -1), keepdim=True) < samples.square().sum((-2, -1), keepdim=True)
    narrow = rest.abs().amax((-2, -1), keepdim=True) <= 1.125 * samples.abs().amax((-2, -1), keepdim=True)
    return key - anchor * (lower & narrow)


def _refused_by_mindie(facts: Facts) -> str | None:
    if facts.masked:
        return "has a mask, which MindIE-SD does not pass on"
    if facts.scaled:
        return "has a scale of its own, which MindIE-SD does not pass on"
    if facts.uneven:
        return "has values of another width than queries, which MindIE-SD does not support"
    return "shares key heads among query heads, which MindIE-SD does not support" if facts.grouped else None


def _refused_in_fp8(facts: Facts) -> str | None:
    if facts.batch > 1:
        return f"runs on a batch of {facts.batch}, but MindIE-SD's FP8 attention takes a batch of 1"
    return _refused_by_mindie(facts)


def _refused_in_mxfp8(facts: Facts) -> str | None:
    if not facts.same_length:
        return "is cross-attention, but MindIE-SD's MXFP8 attention needs as many keys as queries"
    return _refused_by_mindie(facts)


def _refused_by_comfy(facts: Facts) -> str | None:
    if facts.uneven:
        return "has values of another width than queries, which ComfyUI's int8 attention does not support"
    limit = _WIDTHS[-1]
    return f"has heads of {facts.width} channels, but ComfyUI takes up to {limit}" if facts.width > limit else None


KINDS = {
    FP8: Kind(_fp8, _refused_in_fp8, rotates=False, consumer="MindIE-SD"),
    MXFP8: Kind(_mxfp8, _refused_in_mxfp8, rotates=False, consumer="MindIE-SD"),
    COMFY_INT8: Kind(_int8, _refused_by_comfy, rotates=True, consumer="ComfyUI"),
}
