"""Runs a pipeline over prompts for `octavo capture`, and stores, skips or reports each prompt."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from functools import partial, reduce
from typing import Any

from octavo.calibrate.errors import out_of_memory
from octavo.capture.errors import (
    DeviceError,
    FileError,
    MisfitError,
    NumbersError,
    OctavoError,
    StorageError,
    Unstorable,
    first_sentence,
)  # fmt: skip
from octavo.capture.kept_steps import KeptSteps, keep_rule
from octavo.capture.progress import duration
from octavo.capture.ranks import ALONE, Ranks
from octavo.capture.recorder import Clock, Recorder
from octavo.capture.space import check_space
from octavo.capture.store.writer import CaptureWriter, UnitWriter, unit_key
from octavo.pipelines.run import RunSettings, announced_steps, prompt_seed, run_prompt, total_steps

from ..terminal import Interrupted, Terminal, count_of, size
from .capture_options import CaptureOptions

_RESUME = "Free space and run again with --resume"


@dataclass
class Tally:
    """Counts and durations of captured prompts: of one prompt, of all prompts that this process has captured so far, or
    of the prompts of all processes.

    calls          number of stored calls
    raw_bytes      bytes of the tensors of the stored calls
    stored_bytes   bytes that the stored calls take on disk
    recording      seconds for recording and storing the calls
    running        seconds for whole prompts, recording included
    skipped        number of calls that were left out because of NaN or Inf
    saturated      number of calls with float16 values at the limit of 65504
    called         names of the denoisers that were called
    stored         names of the denoisers with stored calls
    steps          how many denoising steps each prompt took, as a set: {28} if all took 28
    swapped        dict from denoiser to the number of attention processors that the pipeline replaced
    failed         numbers of the failed prompts, from 1
    """

    calls: int = 0  # stored calls
    raw_bytes: int = 0  # bytes of their tensors
    stored_bytes: int = 0  # bytes on disk
    recording: float = 0.0  # seconds spent in hooks and in writing
    skipped: int = 0  # calls left out because of NaN or Inf
    saturated: int = 0  # calls with float16 values at the limit of 65504
    called: set[str] = field(default_factory=set)  # names of denoisers that were called
    stored: set[str] = field(default_factory=set)  # names of denoisers with stored calls
    steps: set[int] = field(default_factory=set)  # numbers of denoising steps of the prompts
    # by denoiser: number of attention processors that the pipeline replaced by its own while it ran
    swapped: dict[str, int] = field(default_factory=dict)
    failed: list[int] = field(default_factory=list)  # numbers of the prompts that failed, from 1
    running: float = 0.0  # seconds for whole prompts, recording included

    def plus(self, other: "Tally") -> "Tally":
        """Returns the tally of the prompts of this tally and those of `other` together: numbers are added, sets united,
        and lists joined."""
        pairs = {item.name: (getattr(self, item.name), getattr(other, item.name)) for item in fields(self)}
        joined: dict[str, Any] = {n: a | b if isinstance(a, (set, dict)) else a + b for n, (a, b) in pairs.items()}
        return Tally(**joined)


class Job:
    """Captures the calls of a pipeline's denoisers, prompt by prompt.

    `modules` is a dict from name to denoiser; `arguments` are the arguments of the pipeline's call. `tally` sums up the
    prompts captured so far.
    """

    def __init__(
        self,
        pipe: Any,
        modules: dict[str, Any],
        arguments: dict[str, Any],
        settings: RunSettings,
        options: CaptureOptions,
        terminal: Terminal,
        ranks: Ranks = ALONE,
    ) -> None:
        self.pipe, self.modules, self.arguments = pipe, modules, arguments
        self.settings, self.options, self.terminal, self.ranks = settings, options, terminal, ranks
        self.steps = total_steps(pipe, arguments)
        self.keep = KeptSteps(keep_rule(options.keep), self.steps, lambda: announced_steps(pipe))
        self.tally = Tally()

    def capture(self, writer: CaptureWriter, texts: list[str]) -> None:
        """Captures this rank's share of the prompts in `texts`, without those that are stored already; `writer` writes
        the capture. At the end, `tally` covers the prompts of all ranks. Raises OctavoError if the capture holds no
        prompt at the end."""
        try:
            self._share(writer, [self._info(text) for text in texts])
            tallies = self.ranks.gather(self.tally)
        except Interrupted as interrupt:
            count = f"{len(writer.unit_names())} of {len(texts)} prompts are stored"
            interrupt.note = f"Interrupted: {count}. Run again with --resume."
            raise
        self.tally = reduce(Tally.plus, tallies)
        self.tally.failed.sort()
        if not writer.unit_names():
            raise OctavoError(f"{self.options.capture}: no prompt could be captured. See the errors above.")
        if self.ranks.rank == 0 and not self.tally.failed:
            writer.complete()

    def _share(self, writer: CaptureWriter, infos: list[dict[str, Any]]) -> None:
        """Captures this rank's share of the prompts that `writer` has not stored yet. `infos` describes all prompts.
        After the first prompt of this rank, prints how much space and time the remaining prompts will take, and checks
        that the disk has the space."""
        todo = _unstored(writer, infos, self.options)
        rest = len(todo) - self.ranks.world  # prompts that remain when each rank has captured one
        with self.terminal.bars("prompts", len(infos), self.steps) as show:
            for count, (index, number) in enumerate(self.ranks.share(todo)):
                done = len(infos) - len(todo) + self.ranks.count("prompts")
                show(done, 0)
                self._prompt(writer, index, infos[number], number + 1, partial(show, done))
                self.ranks.count("prompts", 1)
                if count == 0 and rest > 0 and self.tally.calls:
                    self._estimate(rest)
                    check_space(self.options.capture, self.tally.stored_bytes * rest, _RESUME)

    def _info(self, text: str) -> dict[str, Any]:
        """Returns the description of the prompt `text` for its unit (the stored calls of one prompt): the settings of
        the run, the prompt and its seed."""
        settings = self.settings.as_dict() | {"steps": self.steps, "keep": self.options.keep}
        return settings | {"prompt": text, "seed": prompt_seed(text, self.settings.seed)}

    def _prompt(
        self, writer: CaptureWriter, index: int, info: dict[str, Any], number: int, show: Callable[[int], None]
    ) -> None:
        """Captures one prompt. An error is raised; with --keep-going it is only printed as a warning. MisfitError,
        StorageError and DeviceError are raised in any case.

        `index` is the number of the unit to write, counted from 0. `info` describes the prompt, and `number` is its
        position in the list of prompts, counted from 1. `show` gets the number of finished denoising steps after each
        step.
        """
        began, clock = time.perf_counter(), Clock()
        try:
            tally = self._run(writer, index, info, number, show, clock)
            if tally is None:
                clock = Clock()
                tally = self._run(writer, index, info, number, show, clock)
            if tally is None:
                fact = f"prompt {number} took another number of steps when it was run again"
                raise MisfitError(f"{fact}, so --keep {self.options.keep} cannot choose steps. Use --keep every:N.")
        except Exception as error:
            refusal = self._refusal(error, number, clock.step, len(writer.unit_names()))
            if not self.options.keep_going or isinstance(refusal, MisfitError | StorageError | DeviceError):
                raise refusal from error
            self.tally.failed.append(number)
            self.terminal.warn(str(refusal), own=True)
            return
        tally.running = time.perf_counter() - began
        self.tally = self.tally.plus(tally)
        self.terminal.event("prompt", own=True, number=number, calls=tally.calls, stored_bytes=tally.stored_bytes)

    def _run(
        self, writer: CaptureWriter, index: int, info: dict[str, Any], number: int, show: Callable[[int], None],
        clock: Clock,
    ) -> Tally | None:  # fmt: skip
        """Runs the prompt described by `info`, stores its calls with `writer` as unit `index`, and returns its tally.
        `number` is the prompt's number in messages; `show` gets the number of finished steps, and `clock` counts steps.
        Stores nothing and returns None if the run had another number of steps than expected, so that the option --keep,
        which says which steps to store, chose the wrong ones."""
        tally = Tally()
        self.keep.begin()
        try:
            with writer.unit(index, info) as unit, ExitStack() as stack:
                sink = CheckedSink(unit, number, self.options, tally)
                dropped = frozenset(self.options.dropped)
                recorders = [
                    stack.enter_context(Recorder(module, sink, name=name, clock=clock, keep=self.keep, drop=dropped))
                    for name, module in self.modules.items()
                ]

                def stepped(step: int) -> None:
                    clock.tick()
                    show(step + 1)

                run_prompt(self.pipe, info["prompt"], self.arguments, self.settings.seed, stepped)
                if not any(recorder.call_count for recorder in recorders):
                    names = " or ".join(self.modules)
                    fact = f"the pipeline never called {names}"
                    raise MisfitError(f"prompt {number}: {fact}. Choose another --component.")
                if self.keep.miscounted():
                    raise _Miscounted
                pipeline_ended = time.perf_counter()
        except _Miscounted:
            return None
        tally.recording = sum(r.seconds for r in recorders) + time.perf_counter() - pipeline_ended
        tally.called = {recorder.name for recorder in recorders if recorder.call_count}
        tally.steps = {self.keep.count}
        tally.swapped = {recorder.name: recorder.swapped for recorder in recorders if recorder.swapped}
        tally.calls, tally.raw_bytes, tally.stored_bytes = unit.calls, unit.raw_bytes, unit.stored_bytes
        return tally

    def _refusal(self, error: Exception, number: int, step: int, stored: int) -> OctavoError:
        """Returns the error to show for the exception `error`, raised in the denoising step `step` of prompt `number`.
        `stored`: how many prompts are stored already."""
        if isinstance(error, Unstorable) and error.name is not None:
            return FileError(f"{error.fact}. Exclude it with --drop-input {error.name}.")
        if isinstance(error, OctavoError):
            return error
        if (device := out_of_memory(error)) is not None:
            where = f"out of memory on {device or self.options.device} at prompt {number}, step {step}"
            remedy = "Run again with --resume and --offload, or capture at a smaller --height and --width"
            return DeviceError(f"{where}. Prompts stored so far: {stored}. {remedy}.")
        fact = first_sentence(error)
        remedy = "Change the settings of the call, or use --keep-going to skip prompts that fail"
        return OctavoError(f"prompt {number}: {type(error).__name__}: {fact}. {remedy}.")

    def _estimate(self, rest: int) -> None:
        """Prints how much space and time the `rest` remaining prompts will take, estimated from the first prompt of
        this rank."""
        tally = self.tally
        disk, seconds = tally.stored_bytes * rest, tally.running * -(-rest // self.ranks.world)
        prompts = count_of(rest, "more prompt")
        self.terminal.say(f"{prompts} will take about {size(disk)} on disk and {duration(seconds)}.")
        self.terminal.event("estimate", prompts=rest, bytes=disk, seconds=round(seconds, 3))


class _Miscounted(Exception):
    """Raised inside `with writer.unit(...)`, to discard the unit, if the wrong denoising steps were stored. The option
    --keep decides which steps to store, from the number of steps that is expected, and the run took another number."""


class CheckedSink:
    """Stores the recorded calls of one prompt in `unit`. Every call is first checked for NaN and Inf. If it has any,
    the option --nonfinite decides: `error` raises NumbersError, `skip` leaves the call out. `tally` counts the calls
    that were left out, and the calls with float16 values at the limit of 65504. `number` is the number of the prompt,
    from 1, for messages."""

    def __init__(self, unit: UnitWriter, number: int, options: CaptureOptions, tally: Tally) -> None:
        self.unit, self.number, self.options, self.tally = unit, number, options, tally

    def add(self, call: Any) -> None:
        """Stores a recorded call. If the call has NaN or Inf, it is left out under --nonfinite skip, and NumbersError
        is raised under --nonfinite error."""
        self.unit.add(call, lambda stats: self._accept(call, stats))

    def _accept(self, call: Any, stats: dict[str, Any]) -> bool:
        """Returns whether to store a call: it must have no NaN or Inf. Counts calls that are left out, and calls with
        values at the limit of float16, in `tally`. `stats` is a dict from the path of a tensor in the call's arguments
        to its statistics: how many values are NaN or Inf, and whether any is at the limit. Raises NumbersError for NaN
        or Inf with --nonfinite error."""
        bad = {path: s.nonfinite for path, s in stats.items() if s.nonfinite}
        if bad and self.options.nonfinite == "error":
            path, count = next(iter(bad.items()))
            fact = f"{path} has {count} values that are NaN or Inf, perhaps from a float16 overflow"
            raise NumbersError(
                f"prompt {self.number} step {call.step}: {fact}. Use another --dtype or --nonfinite skip."
            )
        self.tally.skipped += bool(bad)
        self.tally.saturated += any(s.saturated for s in stats.values())
        if not bad:
            self.tally.stored.add(call.component)
        return not bad


def _unstored(writer: CaptureWriter, infos: list[dict[str, Any]], options: CaptureOptions) -> list[tuple[int, int]]:
    """Returns (number of the unit to write, index in `infos`) for each prompt of `infos` that `writer` has not stored
    yet. A unit is the stored calls of one prompt.

    Raises MisfitError if a stored prompt is no longer among `infos`, unless --keep-removed is set.
    """
    stored_keys, keys = set(writer.stored.values()), [unit_key(info) for info in infos]
    removed = stored_keys - set(keys)
    if removed and not options.keep_removed:
        source = options.prompts or "the prompts"
        fact = f"no longer has {len(removed)} of the captured prompts"
        raise MisfitError(f"{source}: {fact}. Use --keep-removed to keep their calls, or another directory.")
    used = set(writer.stored)
    todo = []
    for number, key in enumerate(keys):
        if key not in stored_keys:
            index = number if number not in used else max(*used, len(keys) - 1) + 1
            used.add(index)
            todo.append((index, number))
    return todo
