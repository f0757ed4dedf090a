"""The spatial or temporal block of the transformer, and the transformer's last layer."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Captions, CrossAttention, SelfAttention
from .embedders import Mlp, Rotation


def multiply_add(base: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """Computes base + x * factor; in half precision the product is rounded before it is added."""
    if base.dtype == x.dtype == torch.float32:
        return torch.addcmul(base, x, factor)
    return base + x * factor


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Applies LayerNorm without weights (eps 1e-6, in fp32 inside), then scales by 1 + scale and shifts."""
    return multiply_add(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class STDiT3Block(nn.Module):
    """Computes a block: self-attention over a frame (spatial) or over time (temporal), cross-attention, MLP.

    x is (B, T, S, C): B samples, T frames, S tokens of a frame, C channels. modulation is (B, T, 6, C), or (B, 1, 6, C)
    if all frames have the same modulation. Its six vectors are shift, scale and gate of the self-attention, then shift,
    scale and gate of the MLP. rotation is the rotary position embedding over time; it is None for spatial blocks.
    """

    def __init__(self, channels: int, heads: int, mlp_ratio: float, qk_norm: bool, temporal: bool) -> None:
        super().__init__()
        self.temporal = temporal
        self.scale_shift_table = nn.Parameter(torch.randn(6, channels) / channels**0.5)
        self.attn = SelfAttention(channels, heads, qk_norm)
        self.cross_attn = CrossAttention(channels, heads)
        self.mlp = Mlp(channels, int(channels * mlp_ratio), channels)

    def forward(self, x: Tensor, captions: Captions, modulation: Tensor, rotation: Rotation | None = None) -> Tensor:
        table = (self.scale_shift_table + modulation)[:, :, :, None]  # (B, T or 1, 6, 1, C)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = table.unbind(2)
        x = multiply_add(x, self._self_attention(modulate(x, shift, scale), rotation), gate)
        x = x + self.cross_attn(x.flatten(1, 2), captions).view_as(x)
        return multiply_add(x, self.mlp(modulate(x, mlp_shift, mlp_scale)), mlp_gate)

    def _self_attention(self, x: Tensor, rotation: Rotation | None) -> Tensor:
        if not self.temporal:
            return self.attn(x.flatten(0, 1)).view_as(x)
        by_place = x.transpose(1, 2)  # (B, S, T, C)
        return self.attn(by_place.flatten(0, 1), rotation).view_as(by_place).transpose(1, 2)


class FinalLayer(nn.Module):
    """Computes the last layer, x (B, T, S, C) to (B, T, S, P), where P is the number of values in an output patch. x
    has B samples of T frames of S tokens with C channels. A norm of x is modulated by the time embedding t (B, C).

    Frames that are False in x_mask (B, T) are taken as clean. Because the model was trained so, the modulated tokens of
    these frames are normed and modulated a second time, with t0, the embedding of time 0.
    """

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(2, channels) / channels**0.5)
        self.linear = nn.Linear(channels, outputs)

    def forward(self, x: Tensor, t: Tensor, t0: Tensor | None = None, x_mask: Tensor | None = None) -> Tensor:
        x = modulate(x, *self._shift_scale(t))
        if t0 is not None and x_mask is not None:
            x = torch.where(x_mask[:, :, None, None], x, modulate(x, *self._shift_scale(t0)))
        return self.linear(x)

    def _shift_scale(self, t: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale = (self.scale_shift_table + t[:, None])[:, :, None, None].unbind(1)  # each (B, 1, 1, C)
        return shift, scale
