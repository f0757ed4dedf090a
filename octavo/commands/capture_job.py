"""One run of a pipeline over prompts, and what comes of each prompt."""

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

from ..terminal import Interrupted, Terminal, size
from .capture_options import CaptureOptions

_RESUME = "Free space and run again with --resume"


@dataclass
class Tally:
    """Counts of a run so far."""

    calls: int = 0
    raw_bytes: int = 0
    stored_bytes: int = 0
    recording: float = 0.0  # seconds
    skipped: int = 0  # calls with values that are not finite
    saturated: int = 0  # calls with float16 values at their limit
    heard: set[str] = field(default_factory=set)  # denoisers that were called
    stored: set[str] = field(default_factory=set)  # denoisers of which calls are stored
    steps: set[int] = field(default_factory=set)  # numbers of steps that prompts took
    swapped: dict[str, int] = field(default_factory=dict)  # by denoiser: attention layers run in the pipeline's way
    failed: list[int] = field(default_factory=list)  # numbers of the prompts, from 1
    running: float = 0.0  # seconds inside the pipeline

    def plus(self, other: "Tally") -> "Tally":
        """The counts of two runs together."""
        pairs = {item.name: (getattr(self, item.name), getattr(other, item.name)) for item in fields(self)}
        joined: dict[str, Any] = {n: a | b if isinstance(a, (set, dict)) else a + b for n, (a, b) in pairs.items()}
        return Tally(**joined)


class Job:
    """One pipeline, its denoisers and how they are to be run over the prompts."""

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
        """Captures this rank's share of the prompts that are not stored; afterwards `tally` is of all ranks."""
        try:
            self._share(writer, [self._info(text) for text in texts])
            tallies = self.ranks.gather(self.tally)
        except Interrupted as stop:
            count = f"{len(writer.unit_names())} of {len(texts)} prompts are stored"
            stop.note = f"Interrupted: {count}. Run again with --resume."
            raise
        self.tally = reduce(Tally.plus, tallies)
        self.tally.failed.sort()
        if not writer.unit_names():
            raise OctavoError(f"{self.options.capture}: no prompt could be captured. See the errors above.")
        if self.ranks.rank == 0 and not self.tally.failed:
            writer.complete()

    def _share(self, writer: CaptureWriter, infos: list[dict[str, Any]]) -> None:
        todo = _unstored(writer, infos, self.options)
        with self.terminal.bars("prompts", len(infos), self.steps) as show:
            for at, (index, number) in enumerate(self.ranks.share(todo)):
                done = len(infos) - len(todo) + self.ranks.count("prompts")
                show(done, 0)
                self._prompt(writer, index, infos[number], number + 1, partial(show, done))
                self.ranks.count("prompts", 1)
                if at == 0 and len(todo) > self.ranks.world and self.tally.calls:
                    self._estimate(len(todo) - self.ranks.world)
                    check_space(self.options.capture, self.tally.stored_bytes * (len(todo) - self.ranks.world), _RESUME)

    def _info(self, text: str) -> dict[str, Any]:
        settings = self.settings.as_dict() | {"steps": self.steps, "keep": self.options.keep}
        return settings | {"prompt": text, "seed": prompt_seed(text, self.settings.seed)}

    def _prompt(
        self, writer: CaptureWriter, index: int, info: dict[str, Any], number: int, show: Callable[[int], None]
    ) -> None:
        began, clock = time.perf_counter(), Clock()
        try:
            tally = self._run(writer, index, info, number, show, clock)
            if tally is None:
                clock = Clock()
                tally = self._run(writer, index, info, number, show, clock)
            if tally is None:
                fact = f"prompt {number} does not take as many steps when it runs again"
                raise MisfitError(f"{fact}. Use --keep every:N.")
        except Exception as error:
            refused = self._refusal(error, number, clock.step, len(writer.unit_names()))
            if not self.options.keep_going or isinstance(refused, MisfitError | StorageError | DeviceError):
                raise refused from error
            self.tally.failed.append(number)
            self.terminal.warn(str(refused), own=True)
            return
        tally.running = time.perf_counter() - began
        self.tally = self.tally.plus(tally)
        self.terminal.event("prompt", own=True, number=number, calls=tally.calls, stored_bytes=tally.stored_bytes)

    def _run(
        self, writer: CaptureWriter, index: int, info: dict[str, Any], number: int, show: Callable[[int], None],
        clock: Clock,
    ) -> Tally | None:  # fmt: skip
        """Runs a prompt and stores its unit. None: nothing is stored, for its steps were miscounted."""
        tally = Tally()
        self.keep.begin()
        try:
            with writer.unit(index, info) as unit, ExitStack() as stack:
                heard = Heard(unit, number, self.options, tally)
                dropped = frozenset(self.options.dropped)
                recorders = [
                    stack.enter_context(Recorder(module, heard, name=name, clock=clock, keep=self.keep, drop=dropped))
                    for name, module in self.modules.items()
                ]

                def stepped(step: int) -> None:
                    clock.tick()
                    show(step + 1)

                run_prompt(self.pipe, info["prompt"], self.arguments, self.settings.seed, stepped)
                if not any(recorder.call_count for recorder in recorders):
                    names = " or ".join(self.modules)
                    raise MisfitError(f"prompt {number}: the {names} was never called. Choose another --component.")
                if self.keep.miscounted():
                    raise _Miscounted
                inside = time.perf_counter()
        except _Miscounted:
            return None
        tally.recording = sum(r.seconds for r in recorders) + time.perf_counter() - inside
        tally.heard = {recorder.name for recorder in recorders if recorder.call_count}
        tally.steps = {self.keep.count}
        tally.swapped = {recorder.name: recorder.swapped for recorder in recorders if recorder.swapped}
        tally.calls, tally.raw_bytes, tally.stored_bytes = unit.calls, unit.raw_bytes, unit.stored_bytes
        return tally

    def _refusal(self, error: Exception, number: int, step: int, stored: int) -> OctavoError:
        """The error as the user should read it."""
        if isinstance(error, Unstorable) and error.name is not None:
            return FileError(f"{error.fact}; exclude it with --drop-input {error.name}.")
        if isinstance(error, OctavoError):
            return error
        if (device := out_of_memory(error)) is not None:
            where = f"out of memory on {device or self.options.device} at prompt {number}, step {step}"
            return DeviceError(f"{where}. {stored} prompts are stored; try --offload or a smaller size, then --resume.")
        fact = first_sentence(error)
        remedy = "Change the settings, or pass --keep-going to leave such prompts out"
        return OctavoError(f"prompt {number}: {type(error).__name__}: {fact}. {remedy}.")

    def _estimate(self, left: int) -> None:
        tally = self.tally
        disk, seconds = tally.stored_bytes * left, tally.running * -(-left // self.ranks.world)
        self.terminal.say(f"The other {left} prompts will take about {size(disk)} and {duration(seconds)}.")
        self.terminal.event("estimate", prompts=left, bytes=disk, seconds=round(seconds, 3))


class _Miscounted(Exception):
    """Leaves a unit whose run kept other steps than asked for; see KeptSteps."""


class Heard:
    """The sink of one prompt: looks at the numbers of a call before the unit takes it."""

    def __init__(self, unit: UnitWriter, number: int, options: CaptureOptions, tally: Tally) -> None:
        self.unit, self.number, self.options, self.tally = unit, number, options, tally

    def add(self, call: Any) -> None:
        self.unit.add(call, lambda stats: self._accept(call, stats))

    def _accept(self, call: Any, stats: dict[str, Any]) -> bool:
        bad = {path: s.nonfinite for path, s in stats.items() if s.nonfinite}
        if bad and self.options.nonfinite == "error":
            path, count = next(iter(bad.items()))
            fact = f"{path} has {count} non-finite values (fp16 overflow?)"
            raise NumbersError(
                f"prompt {self.number} step {call.step}: {fact}. Use another --dtype or --nonfinite=skip."
            )
        self.tally.skipped += bool(bad)
        self.tally.saturated += any(s.saturated for s in stats.values())
        if not bad:
            self.tally.stored.add(call.component)
        return not bad


def _unstored(writer: CaptureWriter, infos: list[dict[str, Any]], options: CaptureOptions) -> list[tuple[int, int]]:
    """(index of the unit to make, place in `infos`) of the prompts that are not stored; MisfitError when some
    stored ones are no longer asked for."""
    there, keys = set(writer.stored.values()), [unit_key(info) for info in infos]
    removed = there - set(keys)
    if removed and not options.keep_removed:
        source = options.prompts or "the prompts"
        fact = f"{len(removed)} captured prompts are no longer in the file"
        raise MisfitError(f"{source}: {fact}. Use --keep-removed or another directory.")
    taken = set(writer.stored)
    todo = []
    for number, key in enumerate(keys):
        if key not in there:
            index = number if number not in taken else max(*taken, len(keys) - 1) + 1
            taken.add(index)
            todo.append((index, number))
    return todo
