"""Runs a pipeline on one prompt, and maps settings to the arguments that the pipeline takes."""

import inspect
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from octavo.capture.errors import UsageError

from .family import Family
from .long_prompts import counted_elsewhere


@dataclass(frozen=True)
class RunSettings:
    """The settings of a run; None leaves the choice to the family, then to the pipeline."""

    negative_prompt: str | None = None
    steps: int | None = None
    height: int | None = None
    width: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    arguments: Mapping[str, Any] = field(default_factory=dict)  # further arguments of the pipeline's call

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON values, without those that are None."""
        known = {k: v for k, v in asdict(self).items() if v is not None and k != "arguments"}
        return known | {f"arguments.{k}": repr(v) for k, v in self.arguments.items()}


def prompt_seed(prompt: str, seed: int) -> int:
    """The seed of a prompt's noise, which depends on the text, not on the prompt's position in the file."""
    return (zlib.crc32(prompt.encode()) + seed) % 2**32


def call_arguments(pipe: Any, family: Family, settings: RunSettings) -> dict[str, Any]:
    """The keyword arguments of `pipe(...)`, except for prompt and generator.

    Raises UsageError for a setting that this pipeline does not take, and when the pipeline needs more arguments.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    wanted = {
        "negative_prompt": settings.negative_prompt,
        "num_inference_steps": settings.steps,
        "height": settings.height,
        "width": settings.width,
        "guidance_scale": settings.guidance_scale,
        **settings.arguments,
    }
    wanted = {name: value for name, value in wanted.items() if value is not None}
    kind = type(pipe).__name__
    for name in wanted:
        if name not in parameters:
            raise UsageError(f"{kind}: takes no argument {name}. Leave it out.")
    if "prompt" in parameters and _deaf(pipe) and not any("prompt_embeds" in name for name in wanted):
        raise UsageError(f"{kind}: has no text encoder for its prompts. Give its folder with --text-encoder.")
    made = {name: value for name, value in family.defaults.items() if name in parameters} | wanted
    given = {*made, "self", "prompt", "generator"}
    for name, parameter in parameters.items():
        free = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.default is parameter.empty and not free and name not in given:
            raise UsageError(f"{kind}: needs {name}. Give it with --arg {name}=VALUE.")
    return made


def _deaf(pipe: Any) -> bool:
    """Whether a pipeline has components for text encoders, all of them empty."""
    encoders = [part for name, part in vars(pipe).items() if name.startswith("text_encoder")]
    return bool(encoders) and all(part is None for part in encoders)


def total_steps(pipe: Any, arguments: Mapping[str, Any]) -> int:
    """The number of denoising steps for a prompt, from the call's arguments and their defaults; 0 where not known."""
    parameter = inspect.signature(type(pipe).__call__).parameters.get("num_inference_steps")
    steps = arguments.get("num_inference_steps", parameter.default if parameter else 0)
    return steps if isinstance(steps, int) else 0


def announced_steps(pipe: Any) -> int | None:
    """The number of steps that most pipelines of diffusers set before their first; None where it is not set."""
    steps = vars(pipe).get("_num_timesteps")
    return steps if isinstance(steps, int) else None


def run_prompt(
    pipe: Any,
    prompt: str,
    arguments: Mapping[str, Any],
    seed: int,
    on_step: Callable[[int], None] = lambda step: None,
    on_latents: Callable[[torch.Tensor], None] = lambda latents: None,
) -> Any:
    """Runs `pipe` on `prompt` and returns the output. `on_step(i)` is called when the pipeline reports that step i is
    done, and `on_latents` with the latents after that step, where the pipeline passes them."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    extra: dict[str, Any] = dict(arguments)
    if "prompt" in parameters:
        extra["prompt"] = prompt
    if "generator" in parameters:
        extra["generator"] = torch.Generator("cpu").manual_seed(prompt_seed(prompt, seed))
    if "callback_on_step_end" in parameters:

        def done(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step(step)
            if isinstance(tensors.get("latents"), torch.Tensor):
                on_latents(tensors["latents"])
            return {}

        extra["callback_on_step_end"] = done
    with counted_elsewhere():
        return pipe(**extra)


def final_latents(pipe: Any, prompt: str, arguments: Mapping[str, Any], seed: int) -> torch.Tensor:
    """Runs `pipe` on `prompt` and returns the final latents, without decoding.

    Raises UsageError for a pipeline that gives no tensor.
    """
    parameters = inspect.signature(type(pipe).__call__).parameters
    asked = {"output_type": "latent"} if "output_type" in parameters else {}
    made = run_prompt(pipe, prompt, {**arguments, **asked}, seed)
    first = made if isinstance(made, torch.Tensor) else made[0]
    if not isinstance(first, torch.Tensor):
        kind = type(first).__name__
        raise UsageError(f"{type(pipe).__name__}: gives a {kind}, not latents. Choose another pipeline.")
    return first
