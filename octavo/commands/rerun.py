"""Runs a few prompts of a capture again in few steps, to judge mixtures of schemes by the final latents."""

import ast
import time
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, TypeVar

from torch import Tensor

from octavo.calibrate.errors import out_of_memory
from octavo.calibrate.replay.calls import evenly_spaced
from octavo.capture.errors import DeviceError, MisfitError, OctavoError, UsageError, first_sentence
from octavo.capture.progress import duration
from octavo.capture.store.reader import Capture
from octavo.pipelines.family import Family
from octavo.pipelines.run import RunSettings, call_arguments, final_latents

from ..terminal import Terminal

T = TypeVar("T")
PROMPTS, STEPS = 2, 8  # bench/bench_budget.py measures that 8 steps rank layers as 28 do


class Rerun:
    """Calling it gives the final latents of each prompt, with the seed, size and guidance of the capture; the same at
    every call. `seconds` is what the last call took.

    Raises UsageError for a capture without prompts, or with arguments that it does not hold.
    """

    def __init__(self, pipe: Any, capture: Capture, family: Family, prompts: int = PROMPTS, steps: int = STEPS) -> None:
        texts = [unit.info["prompt"] for unit in capture.units if isinstance(unit.info.get("prompt"), str)]
        if not texts:
            raise UsageError(f"{capture.directory}: holds no prompts to run again. Capture with a pipeline.")
        self._prompts = [texts[index] for index in evenly_spaced(len(texts), prompts)]
        self._settings = settings = _settings(capture)
        self._pipe = pipe
        self._arguments = call_arguments(pipe, family, settings)
        captured = capture.manifest.get("settings", {}).get("steps")
        if captured:
            self._arguments["num_inference_steps"] = min(steps, captured)
        self.seconds = 0.0

    def __call__(self) -> list[Tensor]:
        began = time.perf_counter()
        try:
            latents = [final_latents(self._pipe, text, self._arguments, self._settings.seed) for text in self._prompts]
        except OctavoError:
            raise
        except Exception as error:
            raise _refusal(error) from error
        self.seconds = time.perf_counter() - began
        return latents

    @property
    def words(self) -> str:
        """One call in words: 2 prompts in 8 steps."""
        steps = self._arguments.get("num_inference_steps")
        count = f"{len(self._prompts)} prompt{'s' * (len(self._prompts) > 1)}"
        return f"{count} in {steps} steps" if steps else count


class Announced:
    """The terminal's progress, which first says what runs of the pipeline are to come and how long they take."""

    def __init__(self, terminal: Terminal, rerun: Rerun) -> None:
        self._terminal, self._rerun = terminal, rerun

    def __call__(self, label: str, items: Iterable[T], total: int | None = None) -> Iterable[T]:
        if label == "trajectories" and total is not None:
            seconds = total * self._rerun.seconds
            self._terminal.say(
                f"Measuring what layers do to the final latents: {total} runs of {self._rerun.words}, "
                f"about {duration(seconds)}; then a few to check."
            )
            self._terminal.event("trajectories", runs=total, seconds=round(seconds, 3))
        return self._terminal.progress(label, items, total)


def _settings(capture: Capture) -> RunSettings:
    """The settings of the captured runs. Raises UsageError for an argument that the capture does not hold."""
    said = capture.manifest.get("settings", {})
    known = {item.name for item in fields(RunSettings)} - {"arguments", "steps"}
    arguments = {}
    for key, text in said.items():
        name = key.removeprefix("arguments.")
        if name == key:
            continue
        try:
            arguments[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError) as error:
            fact = f"was made with {name}, which it does not hold"
            raise UsageError(f"{capture.directory}: {fact}. Calibrate without --budget.") from error
    return RunSettings(**{name: value for name, value in said.items() if name in known}, arguments=arguments)


def _refusal(error: Exception) -> OctavoError:
    if out_of_memory(error) is not None:
        return DeviceError("out of memory in a run of the pipeline. Use a smaller size or another --device.")
    fact = first_sentence(error)
    return MisfitError(f"the pipeline does not run: {type(error).__name__}: {fact}. Calibrate without --budget.")
