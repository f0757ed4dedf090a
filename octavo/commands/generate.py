"""Runs `octavo generate`: draws a picture or a video of a prompt with a float or a quantized model."""

import time
from typing import Any

from octavo.calibrate.errors import out_of_memory
from octavo.calibrate.resources import peak_memory
from octavo.capture.devices import DTYPES, resolve_device
from octavo.capture.errors import DeviceError, MisfitError, OctavoError, UsageError, first_sentence
from octavo.capture.progress import duration
from octavo.pipelines import family_of
from octavo.pipelines.files import model_directory
from octavo.pipelines.finite import finite_outputs
from octavo.pipelines.long_prompts import long_prompts
from octavo.pipelines.loras import parse_loras
from octavo.pipelines.prompted import note_on_prompts, parameters_of
from octavo.pipelines.run import RunSettings, call_arguments, run_prompt, total_steps

from ..checkpoints import check_files, open_pipeline
from ..terminal import Terminal, size
from .generate_options import GenerateOptions
from .next_command import after_generate
from .save_output import Target, check_count, save, target_of


def run(options: GenerateOptions, terminal: Terminal) -> None:
    """Runs `octavo generate` with `options`: loads the model, draws one picture or video, and writes it."""
    target, settings = target_of(options.out, options.overwrite), options.settings
    device, directory = resolve_device(options.device), model_directory(options.model)
    for warning in check_files(directory):
        terminal.warn(warning)
    pipe = open_pipeline(
        options.model, options.of, options.component, dtype=DTYPES.get(options.dtype or ""), device=device,
        text_encoder=options.text_encoder, offload=options.offload, trust_remote_code=options.trust_remote_code,
        loras=parse_loras(options.loras),
    )  # fmt: skip
    arguments = _arguments(pipe, settings, options, target)
    check_count(arguments, target)
    if note := note_on_prompts(pipe, arguments) or long_prompts(pipe, [options.prompt], arguments):
        terminal.warn(note)
    steps = total_steps(pipe, arguments)
    began = time.monotonic()
    with terminal.bars("generate", 1, steps) as show:
        try:
            with finite_outputs(pipe):
                results = run_prompt(pipe, options.prompt, arguments, options.seed, lambda s: show(0, s + 1))
        except Exception as error:
            raise _refusal(error) from error
    seconds = time.monotonic() - began
    words = save(results[0], target, options.fps or 8)
    if getattr(results, "audio", None) is not None:
        terminal.warn(f"{options.out}: {type(pipe).__name__} also makes sound, which is not written.")
    count = f"{steps} steps, " if steps else ""
    terminal.say(
        f"{options.out}: {words}, {count}{duration(seconds)}, peak memory {size(peak_memory())}. Seed {options.seed}."
    )
    terminal.event(
        "done", out=str(options.out), made=words, steps=steps, seconds=round(seconds, 3), seed=options.seed,
        peak_memory=peak_memory(),
    )  # fmt: skip
    after_generate(options.model, terminal)


def _arguments(pipe: Any, settings: RunSettings, options: GenerateOptions, target: Target) -> dict[str, Any]:
    """Returns the arguments of the pipeline's call, from `settings` (seed, steps and so on) and `options`. Raises
    UsageError if `target` is for pictures or a video, and the pipeline has no VAE and so makes only latents."""
    out = options.out
    arguments = call_arguments(pipe, family_of(type(pipe).__name__), settings, [options.prompt])
    if "output_type" in parameters_of(pipe):
        arguments["output_type"] = "latent" if target.latents else "pil"
        if not target.latents and getattr(pipe, "vae", pipe) is None:
            fact = f"{type(pipe).__name__} was loaded without a VAE and makes only latents"
            raise UsageError(f"{out}: {fact}. Give a .safetensors file with -o.")
    return arguments


def _refusal(error: Exception) -> OctavoError:
    if isinstance(error, OctavoError):
        return error
    if (where := out_of_memory(error)) is not None:
        remedy = "Use --offload, or a smaller --height and --width"
        return DeviceError(f"out of memory on {where or 'the device'}. {remedy}.")
    fact = first_sentence(error)
    return MisfitError(f"the pipeline failed: {type(error).__name__}: {fact}. Run again with --debug for a traceback.")
