"""Runs a pipeline on one prompt, and maps settings to the arguments of the pipeline's call."""

import hashlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from PIL import Image

from octavo.capture.errors import UsageError
from octavo.capture.fingerprint import tensor_bytes

from .family import Family
from .long_prompts import counted_elsewhere
from .prompted import class_label, embedded, labelled, parameters_of, prompt_arguments, rows_of


@dataclass(frozen=True)
class RunSettings:
    """The settings of a run. A setting that is None is replaced by Octavo's default for the pipeline, or, if there is
    none, by the pipeline's own default. `arguments` are further arguments of the pipeline's call."""

    negative_prompt: str | None = None
    steps: int | None = None
    height: int | None = None
    width: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    arguments: Mapping[str, Any] = field(default_factory=dict)  # further arguments of the pipeline's call

    def as_dict(self) -> dict[str, Any]:
        """Returns the settings that are not None as JSON values, with digests in place of pictures and tensors."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "arguments"}
        settings = {name: value for name, value in values.items() if value is not None}
        return settings | {f"arguments.{name}": described(value) for name, value in self.arguments.items()}


def described(value: Any) -> str:
    """Returns a text that is the same for equal values in every process: a literal for a JSON value, else a digest.

    Raises UsageError for a value that is neither JSON, nor a picture, nor a tensor.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(described, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {described(item)}' for key, item in sorted(value.items()))}}}"
    if isinstance(value, Image.Image):
        digest = hashlib.sha256(value.tobytes()).hexdigest()
        return f"<picture {value.mode} {value.width} x {value.height} sha256 {digest}>"
    if isinstance(value, torch.Tensor):
        digest = hashlib.sha256(tensor_bytes(value)).hexdigest()
        return f"<tensor {value.dtype} {tuple(value.shape)} sha256 {digest}>"
    if isinstance(value, torch.dtype):
        return f"<{value}>"
    raise UsageError(f"{type(value).__name__}: a capture cannot record this value. Give JSON, pictures or tensors.")


def prompt_seed(prompt: str, seed: int) -> int:
    """Returns the seed of a prompt's noise, computed from `seed` and the prompt's text; its position among the prompts
    does not matter."""
    return (zlib.crc32(prompt.encode()) + seed) % 2**32


def call_arguments(pipe: Any, family: Family, settings: RunSettings, prompts: Sequence[str] = ()) -> dict[str, Any]:
    """Returns the keyword arguments of `pipe(...)` that all `prompts` share: those in `settings`, and the defaults of
    `family` for what `settings` leave out. Prompt and generator are not among them. A tensor of embeddings with one row
    for each prompt is replaced by a `Rows` object, which maps each prompt to its row.

    Raises UsageError for a setting that this pipeline does not take and for a missing argument. If the pipeline draws
    classes, also raises it for a prompt that is not the name or number of a class.
    """
    parameters = parameters_of(pipe)
    wanted = {
        "negative_prompt": settings.negative_prompt,
        "num_inference_steps": settings.steps,
        "height": settings.height,
        "width": settings.width,
        "guidance_scale": settings.guidance_scale,
        **settings.arguments,
    }
    wanted = {name: _placed(name, value, pipe) for name, value in wanted.items() if value is not None}
    kind = type(pipe).__name__
    for name in wanted:
        if name not in parameters:
            raise UsageError(f"{kind}: takes no argument {name}. Leave it out.")
    _check_prompts(pipe, family, wanted, prompts)
    call = {name: value for name, value in family.defaults.items() if name in parameters} | wanted
    provided = {*call, "self", "prompt", "generator", *(["class_labels"] if labelled(pipe) else [])}
    for name, parameter in parameters.items():
        free = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.default is parameter.empty and not free and name not in provided:
            raise UsageError(f"{kind}: needs {name}. Give it with --arg {name}=VALUE.")
    return rows_of(call, prompts)


def _placed(name: str, value: Any, pipe: Any) -> Any:
    """Returns `value`, the argument `name` of a call of `pipe`. A tensor, also in a list, is moved to the pipeline's
    device. A tensor of embeddings is also cast to the pipeline's dtype; its `name` contains "embeds", such as
    prompt_embeds."""
    if isinstance(value, list):
        return [_placed(name, item, pipe) for item in value]
    if not isinstance(value, torch.Tensor):
        return value
    cast = "embeds" in name and value.is_floating_point() and not name.endswith("mask")
    return value.to(pipe._execution_device, pipe.dtype if cast else None)


def _check_prompts(pipe: Any, family: Family, wanted: Mapping[str, Any], prompts: Sequence[str]) -> None:
    kind = type(pipe).__name__
    if labelled(pipe):
        if "class_labels" in wanted:
            raise UsageError(
                f"{kind}: takes its classes from the prompts, one in each line. Leave out --arg class_labels."
            )
        for text in prompts:
            class_label(pipe, text)
    if "prompt" in parameters_of(pipe) and _lacks_text_encoder(pipe) and not embedded(wanted):
        remedy = "its folder with --text-encoder" if family.load else "embeddings with --arg prompt_embeds=FILE"
        raise UsageError(f"{kind}: has no text encoder for its prompts. Give {remedy}.")


def _lacks_text_encoder(pipe: Any) -> bool:
    encoders = [part for name, part in vars(pipe).items() if name.startswith("text_encoder")]
    return bool(encoders) and all(part is None for part in encoders)


def total_steps(pipe: Any, arguments: Mapping[str, Any]) -> int:
    """Returns the number of denoising steps that `pipe` takes for a prompt: num_inference_steps in the `arguments` of
    its call, or else in the call's defaults; 0 if neither has a number."""
    parameter = parameters_of(pipe).get("num_inference_steps")
    steps = arguments.get("num_inference_steps", parameter.default if parameter else 0)
    return steps if isinstance(steps, int) else 0


def announced_steps(pipe: Any) -> int | None:
    """Returns the number of steps of the current run, which most pipelines store in the attribute `_num_timesteps`;
    None for a pipeline that does not."""
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
    """Runs `pipe` on `prompt`, with noise from `seed` and the prompt's text, and returns the output. `arguments` are
    the arguments of the pipeline's call that all prompts share.

    When the pipeline reports the end of step i, counted from 0, calls `on_step(i)`. If the report has the latents after
    that step, then calls `on_latents` with them.
    """
    parameters = parameters_of(pipe)
    extra = prompt_arguments(pipe, prompt, arguments)
    if "generator" in parameters:
        extra["generator"] = torch.Generator("cpu").manual_seed(prompt_seed(prompt, seed))
    if "callback_on_step_end" in parameters:

        def done(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step(step)
            if isinstance(tensors.get("latents"), torch.Tensor):
                on_latents(tensors["latents"])
            return {}

        extra["callback_on_step_end"] = done
    with counted_elsewhere(pipe, prompt, arguments):
        return pipe(**extra)


def final_latents(pipe: Any, prompt: str, arguments: Mapping[str, Any], seed: int) -> torch.Tensor:
    """Runs `pipe` on `prompt`, with noise from `seed` and the prompt's text, and returns the final latents, without
    decoding. `arguments` are the arguments of the pipeline's call that all prompts share.

    Raises UsageError for a pipeline whose output is not a tensor.
    """
    parameters = parameters_of(pipe)
    form = {"output_type": "latent"} if "output_type" in parameters else {}
    output = run_prompt(pipe, prompt, {**arguments, **form}, seed)
    first = output if isinstance(output, torch.Tensor) else output[0]
    if not isinstance(first, torch.Tensor):
        kind = type(first).__name__
        raise UsageError(f"{type(pipe).__name__}: its output is a {kind}, not latents. Choose another pipeline.")
    return first
