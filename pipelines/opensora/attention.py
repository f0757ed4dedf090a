"""Attention layers: over the tokens of a frame, over the frames of one position, and over the caption."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .embedders import Rotation


class RMSNorm(nn.Module):
    """Divides by the root mean square of the last axis (eps 1e-6, in fp32), casts back, and multiplies each channel by
    a learned factor."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / x.shape[-1]
        return (wide * torch.rsqrt(mean_square + 1e-6)).to(x.dtype).mul_(self.weight)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotates every pair of channels (2j, 2j + 1) of `x` (..., frames, heads, channels) by the angle that `rotation`
    has for the frame and for j."""
    pairs = x.unflatten(-1, (-1, 2))
    if x.dtype == torch.float32:  # the same formula as below in one pass over memory
        current = torch.complex(rotation.cos.float(), rotation.sin.float())[:, None]
        return torch.view_as_real(torch.view_as_complex(pairs) * current).flatten(-2)
    cos, sin = rotation.cos[:, None].to(x.dtype), rotation.sin[:, None].to(x.dtype)
    first, second = pairs.unbind(-1)
    return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)


class SelfAttention(nn.Module):
    """Computes self-attention, (batch, tokens, C) to the same shape, with C channels.

    In temporal blocks the tokens are the frames at one position, and queries and keys are rotated by `rotation`.
    """

    def __init__(self, channels: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.q_norm = RMSNorm(channels // heads) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(channels // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # each (batch, tokens, heads, d)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(out.transpose(1, 2).flatten(2))


class Captions(NamedTuple):
    """Holds the caption tokens of all B samples, one sample after the other without padding.

    `tokens` is (1, sum of lengths, channels). `keep` (B, longest length) is True where a padded tensor of all captions
    would have a token; None if all captions are equally long.
    """

    tokens: Tensor
    keep: Tensor | None


def captions_of_lengths(tokens: Tensor, lengths: Tensor) -> Captions:
    """Makes the Captions of packed tokens (1, sum of `lengths`, channels); `lengths` (B,) counts each sample's
    tokens."""
    longest = int(lengths.max())
    if bool((lengths == longest).all()):
        return Captions(tokens, None)
    places = torch.arange(longest, device=tokens.device)
    return Captions(tokens, places < lengths.to(tokens.device)[:, None])


def pack_captions(y: Tensor, mask: Tensor | None) -> Captions:
    """Packs B captions of L tokens each, `y` (B, L, C), one after the other without padding. Keeps only the tokens
    whose `mask` is not zero, or all tokens if `mask` is None.

    A mask (n, L) with n < B is repeated to B rows. This is for guidance, where n null captions follow the captions of
    the n prompts and get the masks of these prompts.
    """
    if mask is None:
        return Captions(y.flatten(0, 1)[None], None)
    chosen = mask.flatten(1).to(y.device) != 0
    chosen = chosen.repeat(y.shape[0] // chosen.shape[0], 1)
    return captions_of_lengths(y[chosen][None], chosen.sum(1))


class CrossAttention(nn.Module):
    """Computes cross-attention from N image tokens with C channels, (B, N, C), to the caption tokens of the same
    sample."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(channels, channels)
        self.kv_linear = nn.Linear(channels, 2 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, captions: Captions) -> Tensor:
        q = self.q_linear(x).unflatten(-1, (self.heads, -1))  # (B, N, heads, d)
        kv = self.kv_linear(captions.tokens)[0]  # (sum, 2C)
        mask = None
        if captions.keep is None:
            kv = kv.unflatten(0, (x.shape[0], -1))
        else:
            kv = kv.new_zeros(*captions.keep.shape, kv.shape[-1]).index_put((captions.keep,), kv)
            mask = captions.keep[:, None, None, :]
        k, v = kv.unflatten(-1, (2, self.heads, -1)).unbind(2)  # (B, longest, heads, d)
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
        return self.proj(out.transpose(1, 2).flatten(2))
