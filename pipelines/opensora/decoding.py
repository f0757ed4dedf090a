"""Decodes latents to pictures, with the 2-D autoencoder of diffusers."""

from typing import Any

import torch
from diffusers.video_processor import VideoProcessor
from torch import Tensor

from octavo.capture.errors import MisfitError, UsageError

from .defaults import LATENT_SCALE, LATENT_SHIFT

FORMS = ("latent", "pil", "np", "pt")
_FRAMES_AT_ONCE = 4  # frames decoded together, to bound memory


def check_form(output_type: str, vae: Any) -> None:
    """Checks the argument output_type before the run.

    Raises UsageError if it is unknown, or if it needs a VAE and `vae` is None; MisfitError if it needs a VAE and the
    latents of `vae` do not have 4 channels.
    """
    if output_type not in FORMS:
        raise UsageError(f"output_type: {output_type!r} is unknown. Use one of {', '.join(FORMS)}.")
    if output_type == "latent":
        return
    if vae is None:
        raise UsageError("vae: the pipeline has no VAE. Load it with vae=, or ask for output_type='latent'.")
    if vae.config.latent_channels != len(LATENT_SHIFT):
        channels = vae.config.latent_channels
        raise MisfitError(f"vae: it has {channels} latent channels, not 4. Load the VAE that belongs to the model.")


def decode(latents: Tensor, vae: Any, processor: VideoProcessor, output_type: str) -> Any:
    """Decodes latents (n, 4, T, H, W) with `vae` to one picture for each of the T latent frames. `processor` brings the
    pictures into the form `output_type`: "pil", "np" or "pt"."""
    shift = latents.new_tensor(LATENT_SHIFT)[:, None, None, None]
    scale = latents.new_tensor(LATENT_SCALE)[:, None, None, None]
    frames = (latents * scale + shift).transpose(1, 2)  # (n, T, 4, H, W)
    flat = frames.flatten(0, 1).to(vae.dtype) / vae.config.scaling_factor
    pictures = torch.cat([vae.decode(part).sample for part in flat.split(_FRAMES_AT_ONCE)])
    video = pictures.float().unflatten(0, frames.shape[:2]).transpose(1, 2)  # (n, 3, T, height, width)
    return processor.postprocess_video(video, output_type=output_type)
