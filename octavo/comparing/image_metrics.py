"""Turns the outputs of pipelines into pictures, and measures the difference of two pictures: PSNR and SSIM."""

import io
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

_DECODERS = ("vae", "vqvae", "vqgan", "movq")  # attributes of a pipeline that decode latents into pictures
_WINDOW, _SIGMA = 11, 1.5  # pixels: side and standard deviation of SSIM's Gaussian window (Wang et al., 2004)


def output_arguments(parameters: Any, pipe: Any) -> dict[str, Any]:
    """Returns {"output_type": ...} with the value for which a call of `pipe` returns arrays: "np" for pictures, or
    "latent" if `pipe` has no decoder.

    `parameters` are the parameters that a call accepts. Returns {} if `output_type` is not among them.
    """
    if "output_type" not in parameters:
        return {}
    decodes = any(getattr(pipe, name, None) is not None for name in _DECODERS)
    return {"output_type": "np" if decodes or "latents" not in parameters else "latent"}


def output_of(output: Any) -> np.ndarray:
    """Returns the pictures, videos or latents in the output of a pipeline as one array (frames, height, width,
    channels). The frames of all prompts follow one after the other. Pictures and videos get values in 0..1; latents
    keep their values.

    Latents have the shape (prompts, channels, height, width), (prompts, channels, frames, height, width) or (prompts,
    tokens, channels). The tokens of a prompt, which have neither height nor width, become one frame (1, tokens,
    channels, 1).
    """
    first = output if isinstance(output, Tensor) else output[0]
    if isinstance(first, Tensor):
        return np.concatenate([_latent_frames(latents) for latents in first.detach().float().cpu().numpy()])
    return np.concatenate([_picture_frames(value) for value in first])


def _picture_frames(value: Any) -> np.ndarray:
    """Returns the frames (frames, height, width, channels) of a picture or of a video, with values in 0..1.

    A video is an array or a list of pictures.
    """
    if not isinstance(value, np.ndarray):
        pictures = value if isinstance(value, list) else [value]
        value = np.stack([np.asarray(picture) for picture in pictures]) / 255.0
    return value[None] if value.ndim == 3 else value


def _latent_frames(latents: np.ndarray) -> np.ndarray:
    """Returns the latents of one prompt as (frames, height, width, channels). `latents` is (channels, height, width),
    (channels, frames, height, width) or (tokens, channels); the last form becomes (1, tokens, channels, 1)."""
    if latents.ndim == 2:
        return latents[None, :, :, None]
    if latents.ndim == 3:
        latents = latents[:, None]
    return np.moveaxis(latents, 0, -1)


def as_pixels(exact: np.ndarray, other: np.ndarray, decoded: bool) -> tuple[np.ndarray, np.ndarray]:
    """Converts the outputs `exact` and `other` of two pipelines, both (frames, height, width, channels), to uint8
    pictures (frames, height, width, 3).

    With `decoded` the outputs are pictures, and their values 0..1 become 0..255. Otherwise the outputs are latents.
    Then their first three channels become red, green and blue; with fewer than three channels, the first becomes a grey
    picture. In both latents the smallest value of `exact` becomes 0, and the largest value of `exact` 255.
    """
    low, high = (0.0, 1.0) if decoded else (float(exact.min()), float(exact.max()))

    def pixels(value: np.ndarray) -> np.ndarray:
        rgb = value[..., :3] if value.shape[-1] >= 3 else np.repeat(value[..., :1], 3, axis=-1)
        return np.rint(np.clip((rgb - low) / ((high - low) or 1.0), 0.0, 1.0) * 255).astype(np.uint8)

    return pixels(exact), pixels(other)


def mean_square(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the mean squared difference of `a` and `b`, two uint8 pictures or videos."""
    return float(np.square(a.astype(np.float64) - b).mean())


def psnr(error: float) -> float | None:
    """Returns the PSNR 10 log10(255^2 / error) in dB of a mean squared `error`, or None if the error is 0."""
    return 10.0 * math.log10(255.0**2 / error) if error > 0.0 else None


def ssim(a: np.ndarray, b: np.ndarray) -> float | None:
    """Returns the structural similarity of two pictures or videos, uint8 (frames, height, width, channels).

    The value, 1 for equal pictures, is the mean over channels, frames and all windows that lie inside the picture; a
    window is Gaussian, 11 x 11 pixels with a standard deviation of 1.5 pixels (Wang, Bovik, Sheikh and Simoncelli,
    Image Quality Assessment: From Error Visibility to Structural Similarity, 2004). Returns None if a side is shorter
    than 11 pixels.
    """
    if min(a.shape[1:3]) < _WINDOW:
        return None
    distance = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    window = torch.exp(-(distance**2) / (2 * _SIGMA**2))
    window /= window.sum()

    def window_means(x: Tensor) -> Tensor:  # (channels, 1, height, width)
        return F.conv2d(F.conv2d(x, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))

    values = []
    for frame, other in zip(a, b, strict=True):
        x, y = (torch.from_numpy(picture).permute(2, 0, 1)[:, None].double() for picture in (frame, other))
        mean_x, mean_y = window_means(x), window_means(y)
        var_x, var_y = window_means(x * x) - mean_x * mean_x, window_means(y * y) - mean_y * mean_y
        covariance = window_means(x * y) - mean_x * mean_y
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        numerator = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
        values.append((numerator / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())
    return float(torch.stack(values).mean())


def png(picture: np.ndarray) -> bytes:
    """Returns the content of a PNG file of a uint8 picture (height, width, 3)."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", optimize=True)
    return file.getvalue()
