"""RFLOW, the rectified-flow sampler of Open-Sora 1.2 (Liu et al., Flow Straight and Fast, 2022), as a scheduler."""

from typing import NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor

from octavo.capture.errors import UsageError


class VideoShape(NamedTuple):
    """Holds height and width in pixels and the number of frames of n videos, each (n,).

    The timestep transform, which depends on them, is computed in their dtype.
    """

    height: Tensor
    width: Tensor
    num_frames: Tensor


def time_ratio(shape: VideoShape) -> Tensor:
    """Returns the factor (n,) by which the timestep transform shifts the times of each of n videos towards noise.

    The factor is 1 for a 512 x 512 image, and larger for more pixels or frames. For 2 to 16 frames the formula gives
    the factor 0, as in Open-Sora; the transform cannot use this factor. The factor is computed in the dtype of `shape`.
    """
    space = (shape.height * shape.width / (512 * 512)).sqrt()
    frames = shape.num_frames
    frames = torch.ones_like(frames) if frames[0] == 1 else frames // 17 * 5
    return space * frames.sqrt()


def even_times(steps: int, num_timesteps: int, discrete: bool) -> list[float] | list[int]:
    """Returns the starting times of `steps` equal steps that lead from time `num_timesteps` (noise) to time 0 (data).

    With `discrete` the times are rounded to whole numbers.
    """
    times = [(1.0 - i / steps) * num_timesteps for i in range(steps)]
    return [round(t) for t in times] if discrete else times


def per_frame(values: Tensor) -> Tensor:
    """Reshapes `values` (n, T) or (n,) to broadcast over (n, channels, T, height, width)."""
    return values[:, None, :, None, None] if values.ndim == 2 else values[:, None, None, None, None]


class RFlowScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]  # both declare config_name
    """A scheduler of Euler steps along the velocity, which points from noise to data.

    The time of a step is a tensor (n,), one time for each sample, not a scalar.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_timesteps: int = 1000,
        use_discrete_timesteps: bool = False,
        use_timestep_transform: bool = True,
        transform_scale: float = 1.0,
    ) -> None:
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.timesteps = torch.empty(0, 1)  # (steps, n)
        self._step_index = 0

    @property
    def step_index(self) -> int:
        """The number of steps taken since set_timesteps."""
        return self._step_index

    def set_timesteps(
        self,
        num_inference_steps: int,
        device: torch.device | str | None = None,
        *,
        shape: VideoShape | None = None,
        rows: int = 1,
    ) -> None:
        """Sets the attribute `timesteps` (steps, n), on `device`: the times of a run with `num_inference_steps` steps.
        n is the number of videos in `shape`, or `rows` without `shape`.

        The timestep transform, if the config switches it on, needs `shape`. It can round the first time to just above
        num_timesteps, as for 144p images in float32. Then a run with a frame mask (frames to keep) denoises no frame in
        its first step, as in Open-Sora. Raises UsageError for fewer than one step and for a timestep transform without
        `shape`.
        """
        if num_inference_steps < 1:
            raise UsageError(f"num_inference_steps: {num_inference_steps} is too few. Use at least 1.")
        total = self.config["num_timesteps"]
        times = torch.tensor(
            even_times(num_inference_steps, total, self.config["use_discrete_timesteps"]), device=device
        )
        times = times[:, None].repeat(1, rows if shape is None else shape.height.shape[0])
        if self.config["use_timestep_transform"]:
            if shape is None:
                raise UsageError("shape: the timestep transform needs the video's shape. Pass shape=VideoShape().")
            ratio = (time_ratio(shape) * self.config["transform_scale"]).to(times.device)
            share = times / total
            times = ratio * share / (1 + (ratio - 1) * share) * total
        self.timesteps = times
        self.num_inference_steps = num_inference_steps
        self._step_index = 0

    def scale_model_input(self, sample: Tensor, timestep: Tensor | None = None) -> Tensor:
        """Returns the sample unchanged: this sampler scales no input. diffusers passes `timestep`, which is not
        used."""
        return sample

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """Moves `sample` along the velocity `model_output` to the time of the next step, or after the last step to time
        0, and returns it, in a tuple if `return_dict` is False. `timestep` (n,) is the time of this step.

        Raises UsageError if no step is left; set_timesteps begins a new run.
        """
        if self._step_index >= len(self.timesteps):
            raise UsageError("step: all steps are taken. Call set_timesteps before the next run.")
        following = self._step_index + 1
        span = timestep - self.timesteps[following] if following < len(self.timesteps) else timestep
        moved = sample + model_output * per_frame((span / self.config["num_timesteps"]).reshape(-1))
        self._step_index = following
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Mixes `original_samples` with `noise`, linearly in time: at time 0 only the samples, at num_timesteps only
        noise.

        `timesteps` (n,) has the time of each sample.
        """
        share = per_frame((timesteps / self.config["num_timesteps"]).reshape(-1))
        return (1 - share) * original_samples + share * noise

    def __len__(self) -> int:
        return self.config["num_timesteps"]
