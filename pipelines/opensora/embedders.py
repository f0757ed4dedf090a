"""Embedders of the transformer's inputs: patches, positions, times, captions."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoid(values: Tensor, width: int = 256) -> Tensor:
    """Returns the sinusoidal embedding of `values` (n,), float32 (n, width).

    The embedding has the cosines and then the sines of values * 10000^(-2k / width), for k from 0 to width / 2 - 1.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=values.device) / half)
    angles = values.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def position_table(height: int, width: int, channels: int, scale: float, like: Tensor) -> Tensor:
    """Returns the position embedding of a grid of `height` x `width` patches, (1, height * width, channels) in the
    dtype of `like`.

    The first half of the channels encodes the column, the second the row, each as the sines, then the cosines, of
    position * frequency. Along a side of n patches, index i has the position i / scale * root / n, where root is
    sqrt(height * width), rounded. A larger `scale` brings the positions nearer together. The frequencies, 10000^(-4k /
    channels) for k from 0, are rounded to the dtype of `like`; their products with the positions are computed in
    float32.
    """
    base = round(math.sqrt(height * width))
    exponents = torch.arange(channels // 4, dtype=torch.float32, device=like.device) / (channels // 4)
    frequencies = (1.0 / 10000**exponents).to(like.dtype).float()

    def axis(length: int) -> Tensor:
        places = torch.arange(length, dtype=torch.float32, device=like.device) / scale * (base / length)
        angles = places[:, None] * frequencies
        return torch.cat((angles.sin(), angles.cos()), dim=-1)  # (length, channels / 2)

    columns = axis(width).expand(height, -1, -1)
    rows = axis(height)[:, None].expand(-1, width, -1)
    return torch.cat((columns, rows), dim=-1).reshape(1, height * width, channels).to(like.dtype)


class PatchEmbedder(nn.Module):
    """Embeds the patches of latents: (B, channels, frames, height, width) to (B, C, T, H, W), for T x H x W patches
    with C channels each. If an axis does not divide into whole patches, it is padded with zeros at its end."""

    def __init__(self, in_channels: int, channels: int, patch: tuple[int, int, int]) -> None:
        super().__init__()
        self.proj = nn.Conv3d(in_channels, channels, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        patch = self.proj.kernel_size
        time, height, width = (-size % step for size, step in zip(x.shape[2:], patch, strict=True))
        if time or height or width:
            x = F.pad(x, (0, width, 0, height, 0, time))
        return self.proj(x)


class ScalarEmbedder(nn.Module):
    """Embeds numbers, (n,) to (n, C): their sinusoids, cast to the `dtype` given to `forward`, pass through a two-layer
    MLP."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, channels), nn.SiLU(), nn.Linear(channels, channels))

    def forward(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        return self.mlp(sinusoid(values).to(dtype))


class Mlp(nn.Module):
    """Applies a two-layer MLP to the last axis: fc1, GELU (tanh form), fc2."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden)
        self.fc2 = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class CaptionEmbedder(nn.Module):
    """Embeds caption states with E channels, (..., E) to (..., C). `y_embedding` (L, E) holds the states of the L
    tokens of the null caption."""

    y_embedding: Tensor

    def __init__(self, caption_channels: int, channels: int, length: int) -> None:
        super().__init__()
        self.register_buffer("y_embedding", torch.randn(length, caption_channels) / caption_channels**0.5)
        self.y_proj = Mlp(caption_channels, channels, channels)

    def forward(self, y: Tensor) -> Tensor:
        return self.y_proj(y)


class Rotation(NamedTuple):
    """Holds cosines and sines of the rotary angles, each (frames, d / 2), for the d channels of an attention head."""

    cos: Tensor
    sin: Tensor


class RotaryFrequencies(nn.Module):
    """Computes cosines and sines of the rotary embedding of frames, with frequencies that all temporal blocks share.

    Frame index, frequency, product, cosine and sine are all in the dtype of the model, because the model was trained
    with that rounding.
    """

    def __init__(self, head_width: int) -> None:
        super().__init__()
        exponents = torch.arange(0, head_width, 2, dtype=torch.float32) / head_width
        self.freqs = nn.Parameter(1.0 / 10000**exponents, requires_grad=False)

    def forward(self, frames: int) -> Rotation:
        places = torch.arange(frames, device=self.freqs.device).to(self.freqs.dtype)
        angles = places[:, None] * self.freqs
        return Rotation(angles.cos(), angles.sin())
