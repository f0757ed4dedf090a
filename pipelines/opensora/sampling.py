"""The sampling loop: rows with and without the prompt for guidance, frames that are kept or edited, and one step of
RFLOW after the other."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .scheduler import RFlowScheduler, VideoShape, per_frame

Generators = torch.Generator | list[torch.Generator] | None


class Conditions(NamedTuple):
    """Holds what n samples are conditioned on: captions, guidance and frames to keep.

    `arguments` are keyword arguments of the transformer, the same in all steps. Without guidance (guidance_scale None)
    the caption states among them have n rows. With guidance they have 2n: first the prompts' rows, then those of the
    negative or null captions. `frame_mask` (n, T), for T latent frames, is float32: 1 generates a frame, 0 keeps the
    frame of the starting latents, and a value s between redraws this frame during the last share s of the denoising.
    Without a mask all frames are generated.
    """

    arguments: Mapping[str, Tensor]
    guidance_scale: float | None = 7.0
    frame_mask: Tensor | None = None


def denoise_step(
    model: Callable[..., Tensor],
    scheduler: RFlowScheduler,
    latents: Tensor,
    index: int,
    conditions: Conditions,
    generator: Generators = None,
) -> Tensor:
    """Makes denoising step `index` of `latents` (n, channels, frames, height, width) with the transformer `model`;
    returns the latents after the step, in float32. `scheduler` has the times of the steps, and `conditions` the
    captions and the frames to keep. `generator` draws the noise of frames that are redrawn from this step on."""
    t = scheduler.timesteps[index]  # (n,)
    arguments = dict(conditions.arguments)
    rows = 1 if conditions.guidance_scale is None else 2
    before, active = latents, None
    if conditions.frame_mask is not None:
        active = _active(scheduler, conditions.frame_mask, index)
        fresh = active & ~_active(scheduler, conditions.frame_mask, index - 1)
        noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
        latents = torch.where(per_frame(fresh), scheduler.add_noise(before, noise, t), before)
        arguments["x_mask"] = active.repeat(rows, 1)
    output = model(torch.cat([latents] * rows), torch.cat([t] * rows), **arguments)
    velocity = output[:, : latents.shape[1]]
    if conditions.guidance_scale is not None:
        conditional, unconditional = velocity.chunk(2)
        velocity = unconditional + conditions.guidance_scale * (conditional - unconditional)
    moved = scheduler.step(velocity, t, latents, return_dict=False)[0]
    return moved if active is None else torch.where(per_frame(active), moved, before)


def _active(scheduler: RFlowScheduler, frame_mask: Tensor, index: int) -> Tensor:
    """Returns which latent frames step `index` of `scheduler` denoises, (n, T) bool. Index -1 gives the frames that
    are noise before the first step.

    `frame_mask` (n, T) is 1 for frames that start as noise, 0 for frames to keep, and a value between for frames to
    redraw.
    """
    if index < 0:
        return frame_mask == 1
    return frame_mask * scheduler.config["num_timesteps"] >= scheduler.timesteps[index][:, None]


def sample(
    model: Callable[..., Tensor],
    scheduler: RFlowScheduler,
    latents: Tensor,
    conditions: Conditions,
    num_inference_steps: int = 30,
    generator: Generators = None,
) -> Tensor:
    """Denoises the noise `latents` (n, channels, frames, height, width) and returns the final latents. Takes
    `num_inference_steps` steps, whose times `scheduler` sets. `model` is the transformer; `conditions` has the captions
    and the frames to keep; `generator` draws the noise of frames that are redrawn."""
    shape = VideoShape(*(conditions.arguments[name] for name in VideoShape._fields))
    scheduler.set_timesteps(num_inference_steps, latents.device, shape=shape)
    for index in range(num_inference_steps):
        latents = denoise_step(model, scheduler, latents, index, conditions, generator)
    return latents
