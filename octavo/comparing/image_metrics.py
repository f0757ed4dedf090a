"""Pictures of two runs, and how far they are apart."""

import io
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

_DECODERS = ("vae", "vqvae", "vqgan", "movq")
_WINDOW, _SIGMA = 11, 1.5


def output_arguments(parameters: Any, pipe: Any) -> dict[str, Any]:
    """The arguments that make a pipeline, called with `parameters`, give pictures, or latents if it cannot decode."""
    if "output_type" not in parameters:
        return {}
    decodes = any(getattr(pipe, name, None) is not None for name in _DECODERS)
    return {"output_type": "np" if decodes or "latents" not in parameters else "latent"}


def output_of(made: Any) -> np.ndarray:
    """The pictures or videos of what a pipeline gave, one after the other: (frames, height, width, channels), pictures
    in 0..1.

    Latents (channels, height, width), (channels, frames, height, width) or (tokens, channels) keep their values.
    """
    first = made if isinstance(made, Tensor) else made[0]
    if isinstance(first, Tensor):
        return np.concatenate([_of_latents(latents) for latents in first.detach().float().cpu().numpy()])
    return np.concatenate([_of_pictures(value) for value in first])


def _of_pictures(value: Any) -> np.ndarray:
    """A picture, or a video as an array or a list of pictures."""
    if not isinstance(value, np.ndarray):
        value = np.stack([np.asarray(each) for each in (value if isinstance(value, list) else [value])]) / 255.0
    return value[None] if value.ndim == 3 else value


def _of_latents(latents: np.ndarray) -> np.ndarray:
    if latents.ndim == 2:
        return latents[None, :, :, None]
    if latents.ndim == 3:
        latents = latents[:, None]
    return np.moveaxis(latents, 0, -1)


def as_pixels(exact: np.ndarray, other: np.ndarray, decoded: bool) -> tuple[np.ndarray, np.ndarray]:
    """Two outputs as uint8 (frames, height, width, 3). Latents show their first channels, black to white over the
    values of `exact`; a single one is grey."""
    low, high = (0.0, 1.0) if decoded else (float(exact.min()), float(exact.max()))

    def pixels(value: np.ndarray) -> np.ndarray:
        shown = value[..., :3] if value.shape[-1] >= 3 else np.repeat(value[..., :1], 3, axis=-1)
        return np.rint(np.clip((shown - low) / ((high - low) or 1.0), 0.0, 1.0) * 255).astype(np.uint8)

    return pixels(exact), pixels(other)


def mean_square(a: np.ndarray, b: np.ndarray) -> float:
    """The mean squared difference of two uint8 pictures or videos."""
    return float(np.square(a.astype(np.float64) - b).mean())


def psnr(error: float) -> float | None:
    """10 log10(255^2 / error) in dB of a mean square; None: there is no difference."""
    return 10.0 * math.log10(255.0**2 / error) if error > 0.0 else None


def ssim(a: np.ndarray, b: np.ndarray) -> float | None:
    """Structural similarity, 1 for equal pictures: the mean over channels, frames and all whole windows, 11 x 11
    Gaussian with a deviation of 1.5 pixels (Wang, Bovik, Sheikh and Simoncelli, Image Quality Assessment: From Error
    Visibility to Structural Similarity, 2004). None where a side is below 11 pixels.

    `a` and `b` are uint8 (frames, height, width, channels).
    """
    if min(a.shape[1:3]) < _WINDOW:
        return None
    at = torch.arange(_WINDOW, dtype=torch.float64) - _WINDOW // 2
    window = torch.exp(-(at**2) / (2 * _SIGMA**2))
    window /= window.sum()

    def local(x: Tensor) -> Tensor:  # (images, 1, height, width): means over windows
        return F.conv2d(F.conv2d(x, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))

    values = []
    for frame, other in zip(a, b, strict=True):
        x, y = (torch.from_numpy(each).permute(2, 0, 1)[:, None].double() for each in (frame, other))
        mx, my = local(x), local(y)
        vx, vy, both = local(x * x) - mx * mx, local(y * y) - my * my, local(x * y) - mx * my
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        values.append(((2 * mx * my + c1) * (2 * both + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())
    return float(torch.stack(values).mean())


def png(picture: np.ndarray) -> bytes:
    """A uint8 picture as a file."""
    made = io.BytesIO()
    Image.fromarray(picture).save(made, "PNG", optimize=True)
    return made.getvalue()
