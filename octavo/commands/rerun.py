"""Runs a few prompts of a capture again, in few steps. `octavo calibrate --budget` judges the schemes of the layers by
the final latents of these runs."""

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

from ..terminal import Terminal, count_of

T = TypeVar("T")
# prompts and denoising steps of a rerun; with 8 steps layers rank as with 28 (bench/bench_budget.py measures it)
PROMPTS, STEPS = 2, 8


class Rerun:
    """Runs a few captured prompts again: calling the object returns the final latents of each of at most `prompts`
    prompts. The runs have the seed, size and guidance of the capture, and at most `steps` steps. As long as the model
    stays the same, every call returns the same latents.

    `seconds` is how long the last call took. The constructor raises UsageError if the capture stores no prompts, or if
    the pipeline was called with an argument whose value the capture does not store, such as a picture.
    """

    def __init__(self, pipe: Any, capture: Capture, family: Family, prompts: int = PROMPTS, steps: int = STEPS) -> None:
        texts = [unit.info["prompt"] for unit in capture.units if isinstance(unit.info.get("prompt"), str)]
        if not texts:
            raise UsageError(
                f"{capture.directory}: stores no prompts for --budget to run again. Make a capture with octavo capture."
            )
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
        """The number of prompts and steps of one call, in words, such as "2 prompts in 8 steps"."""
        steps = self._arguments.get("num_inference_steps")
        count = count_of(len(self._prompts), "prompt")
        return f"{count} in {steps} steps" if steps else count


class AnnouncedProgress:
    """The progress display of a calibration with --budget. Before the runs of the pipeline begin, prints how many runs
    there will be, and how long they will take."""

    def __init__(self, terminal: Terminal, rerun: Rerun) -> None:
        self._terminal, self._rerun = terminal, rerun

    def __call__(self, label: str, items: Iterable[T], total: int | None = None) -> Iterable[T]:
        if label == "trajectories" and total is not None:
            seconds = total * self._rerun.seconds
            self._terminal.say(
                f"Measuring the effect of each layer on the final latents: {total} runs of {self._rerun.words}, "
                f"about {duration(seconds)}, then a few runs to check the result."
            )
            self._terminal.event("trajectories", runs=total, seconds=round(seconds, 3))
        return self._terminal.progress(label, items, total)


def _settings(capture: Capture) -> RunSettings:
    """Returns the settings of the captured runs. Raises UsageError for an argument whose value the capture does not
    store, such as a picture."""
    settings = capture.manifest.get("settings", {})
    names = {item.name for item in fields(RunSettings)} - {"arguments", "steps"}
    arguments = {}
    for key, text in settings.items():
        name = key.removeprefix("arguments.")
        if name == key:
            continue
        try:
            arguments[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError) as error:
            fact = f"was made with the argument {name}, whose value it does not store"
            raise UsageError(f"{capture.directory}: {fact}. Calibrate without --budget.") from error
    return RunSettings(**{name: value for name, value in settings.items() if name in names}, arguments=arguments)


def _refusal(error: Exception) -> OctavoError:
    if out_of_memory(error) is not None:
        remedy = "Capture a smaller picture size, use another --device, or calibrate without --budget"
        return DeviceError(f"out of memory in a run of the pipeline for --budget. {remedy}.")
    fact = first_sentence(error)
    return MisfitError(f"the pipeline failed: {type(error).__name__}: {fact}. Calibrate without --budget.")
