"""`octavo capture`: runs a pipeline over prompts and stores what its denoisers are called with."""

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from capture.directory import prepare
from capture.errors import CaptureError
from capture.files import Modes, lock
from capture.fingerprint import fingerprint
from capture.keep import keep_rule
from capture.reader import Capture
from capture.recorder import Clock, Recorder
from capture.store import CaptureWriter, UnitWriter, unit_key
from pipelines.denoisers import denoisers
from pipelines.device import DTYPES, resolve_device
from pipelines.inspection import family_at
from pipelines.load import load_pipeline, model_directory
from pipelines.run import RunSettings, call_arguments, prompt_seed, run_prompt, total_steps
from prompts import Prompts, read_prompts

from .failures import out_of_memory
from .terminal import Interrupted, Terminal, duration, size


@dataclass(frozen=True)
class CaptureOptions:
    """The options of the command, by their names."""

    model: str
    capture: Path
    prompts: str = ""
    limit: int | None = None
    negative_prompt: str | None = None
    steps: int | None = None
    height: int | None = None
    width: int | None = None
    guidance_scale: float | None = None
    frames: int | None = None
    fps: int | None = None
    resolution: str | None = None
    aspect: str | None = None
    seed: int = 0
    pipeline: str | None = None
    text_encoder: Path | None = None
    arguments: tuple[str, ...] = ()
    device: str = "auto"
    dtype: str | None = None
    offload: bool = False
    keep: str = "all"
    components: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    nonfinite: str = "error"
    resume: bool = False
    keep_removed: bool = False
    keep_going: bool = False
    strict: bool = False
    pth: Path | None = None
    group_readable: bool = False
    trust_remote_code: bool = False


@dataclass
class Tally:
    """What a run has come to so far."""

    calls: int = 0
    raw_bytes: int = 0
    stored_bytes: int = 0
    recording: float = 0.0  # seconds
    skipped: int = 0  # calls with values that are not finite
    saturated: int = 0  # calls with float16 values at their limit
    failed: list[int] = field(default_factory=list)  # numbers of the prompts, from 1


def run(options: CaptureOptions, terminal: Terminal) -> None:
    """The command. Ends with exit code 1 when `keep_going` left prompts out."""
    began = time.monotonic()
    source = options.prompts or ("demo" if options.model == "demo" else "images")
    prompts = read_prompts(source)
    for warning in prompts.warnings:
        terminal.warn(warning)
    directory = model_directory(options.model)
    prepare(options.capture, Modes(options.group_readable), options.resume)
    lock(options.capture).release()  # writable and free, before a model is loaded
    family = family_at(directory, options.pipeline)
    device = resolve_device(options.device)
    pipe = load_pipeline(
        directory, dtype=DTYPES[options.dtype] if options.dtype else None, device=device, family=family,
        text_encoder=options.text_encoder, offload=options.offload, strict=options.strict,
        trust_remote_code=options.trust_remote_code,
    )  # fmt: skip
    modules = denoisers(pipe, options.components)
    settings = RunSettings(
        options.negative_prompt, options.steps, options.height, options.width, options.guidance_scale, options.seed,
        _further(options),
    )  # fmt: skip
    job = Job(pipe, modules, call_arguments(pipe, family, settings), settings, options, terminal)
    manifest = {
        "model": str(directory.resolve()) if options.model != "demo" else "demo",
        "pipeline": type(pipe).__name__,
        "family": family.name,
        "components": {name: fingerprint(module) for name, module in modules.items()},
        "dtype": str(next(iter(modules.values())).dtype).removeprefix("torch."),
        "settings": settings.as_dict() | {"steps": job.steps, "keep": options.keep, "dropped": sorted(options.dropped)},
        "prompts": min(len(prompts.texts), options.limit or len(prompts.texts)),
        "prompts_source": source,
    }
    _warn_long(pipe, prompts, terminal)
    with CaptureWriter.create(
        options.capture, manifest, resume=options.resume, group_readable=options.group_readable
    ) as writer:
        job.capture(writer, list(prompts.texts[: options.limit]))
    _finish(job, writer, options, terminal, time.monotonic() - began)


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
    ) -> None:
        self.pipe, self.modules, self.arguments = pipe, modules, arguments
        self.settings, self.options, self.terminal = settings, options, terminal
        self.steps = total_steps(pipe, arguments)
        self.keep = keep_rule(options.keep, self.steps)
        self.tally = Tally()
        self.running = 0.0  # seconds inside the pipeline

    def capture(self, writer: CaptureWriter, texts: list[str]) -> None:
        infos = [self._info(text) for text in texts]
        todo = _unstored(writer, infos, self.options)
        with self.terminal.bars("prompts", len(texts), self.steps) as show:
            for done, (index, number) in enumerate(todo):
                show(len(texts) - len(todo) + done, 0, "")
                try:
                    self._prompt(writer, index, infos[number], number + 1, lambda step: show(number, step, ""))
                except Interrupted as stop:
                    stop.note = (  # type: ignore[attr-defined]
                        f"Interrupted: {len(writer.stored)} of {len(texts)} prompts are stored. Run again with --resume."
                    )
                    raise
                if done == 0 and len(todo) > 1 and self.tally.calls:
                    self._estimate(len(todo) - 1)
        if not writer.stored:
            raise CaptureError(f"{self.options.capture}: no prompt could be captured. See the errors above.", 1)
        if not self.tally.failed:
            writer.complete()

    def _info(self, text: str) -> dict[str, Any]:
        settings = self.settings.as_dict() | {"steps": self.steps, "keep": self.options.keep}
        return settings | {"prompt": text, "seed": prompt_seed(text, self.settings.seed)}

    def _prompt(
        self, writer: CaptureWriter, index: int, info: dict[str, Any], number: int, show: Callable[[int], None]
    ) -> None:
        clock, began = Clock(), time.perf_counter()
        try:
            with writer.unit(index, info) as unit, ExitStack() as stack:
                heard = Heard(unit, number, self.options, self.tally)
                recorders = [
                    stack.enter_context(
                        Recorder(module, heard, name=name, clock=clock, keep=self.keep, drop=frozenset(self.options.dropped))
                    )
                    for name, module in self.modules.items()
                ]

                def stepped(step: int) -> None:
                    clock.tick(step)
                    show(step + 1)

                run_prompt(self.pipe, info["prompt"], self.arguments, self.settings.seed, stepped)
                if not any(recorder.heard for recorder in recorders):
                    names = " or ".join(self.modules)
                    raise CaptureError(f"prompt {number}: the {names} was never called. Choose another --component.", 4)
                inside = time.perf_counter()
        except Exception as error:
            refused = self._refusal(error, number, clock.step, len(writer.stored))
            if not self.options.keep_going or getattr(refused, "exit_code", 1) in (4, 5, 7):
                raise refused from error
            self.tally.failed.append(number)
            self.terminal.warn(str(refused))
            return
        self.tally.recording += sum(r.seconds for r in recorders) + time.perf_counter() - inside
        self.running += time.perf_counter() - began
        self.tally.calls += unit.calls
        self.tally.raw_bytes += unit.raw_bytes
        self.tally.stored_bytes += unit.stored_bytes
        self.terminal.event("prompt", number=number, calls=unit.calls, stored_bytes=unit.stored_bytes)

    def _refusal(self, error: Exception, number: int, step: int, stored: int) -> Exception:
        """The error as the user should read it."""
        if hasattr(error, "exit_code"):
            return error
        if (device := out_of_memory(error)) is not None:
            where = f"out of memory on {device or self.options.device} at prompt {number}, step {step}"
            return CaptureError(f"{where}. {stored} prompts are stored; try --offload or a smaller size, then --resume.", 7)
        fact = " ".join(str(error).split()).split(". ")[0].rstrip(".")
        remedy = "Change the settings, or pass --keep-going to leave such prompts out"
        return CaptureError(f"prompt {number}: {type(error).__name__}: {fact}. {remedy}.", 1)

    def _estimate(self, left: int) -> None:
        tally = self.tally
        disk, seconds = tally.stored_bytes * left, self.running * left
        self.terminal.say(f"The other {left} prompts will take about {size(disk)} and {duration(seconds)}.")
        self.terminal.event("estimate", prompts=left, bytes=disk, seconds=round(seconds, 3))


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
            raise CaptureError(f"prompt {self.number} step {call.step}: {fact}. Use another --dtype or --nonfinite=skip.", 6)
        self.tally.skipped += bool(bad)
        self.tally.saturated += any(s.saturated for s in stats.values())
        return not bad


def _unstored(writer: CaptureWriter, infos: list[dict[str, Any]], options: CaptureOptions) -> list[tuple[int, int]]:
    """(index of the unit to make, place in `infos`) of the prompts that are not stored; CaptureError 4 when some
    stored ones are no longer asked for."""
    there, keys = set(writer.stored.values()), [unit_key(info) for info in infos]
    removed = there - set(keys)
    if removed and not options.keep_removed:
        source = options.prompts or "the prompts"
        fact = f"{len(removed)} captured prompts are no longer in the file"
        raise CaptureError(f"{source}: {fact}. Use --keep-removed or another directory.", 4)
    taken = set(writer.stored)
    todo = []
    for number, key in enumerate(keys):
        if key not in there:
            index = number if number not in taken else max(*taken, len(keys) - 1) + 1
            taken.add(index)
            todo.append((index, number))
    return todo


def _further(options: CaptureOptions) -> dict[str, Any]:
    """What the options say beyond RunSettings' own, by the names of the pipeline's call."""
    named = {
        "num_frames": options.frames, "fps": options.fps, "resolution": options.resolution, "aspect": options.aspect,
    }  # fmt: skip
    given = {name: value for name, value in named.items() if value is not None}
    return given | dict(parse_argument(text) for text in options.arguments)


def parse_argument(text: str) -> tuple[str, Any]:
    """NAME=VALUE of --arg: JSON, the path of a picture, or else the text itself."""
    name, found, value = text.partition("=")
    if not found or not name.isidentifier():
        raise CaptureError(f"--arg {text}: not NAME=VALUE. Give the name of an argument of the pipeline's call.", 2)
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        if Path(value).suffix.lower() in (".png", ".jpg", ".jpeg", ".webp") and Path(value).is_file():
            from PIL import Image

            return name, Image.open(value).convert("RGB")
        return name, value


def _warn_long(pipe: Any, prompts: Prompts, terminal: Terminal) -> None:
    tokenizer = getattr(pipe, "tokenizer", None)
    limit = getattr(tokenizer, "model_max_length", 0) if tokenizer is not None else 0
    if tokenizer is None or not 0 < limit < 100_000:
        return
    long = sum(len(tokenizer(text, truncation=False, verbose=False).input_ids) > limit for text in prompts.texts)
    if long:
        terminal.warn(f"{long} of {len(prompts.texts)} prompts are longer than the {limit} tokens of the tokenizer; it cuts them.")


def _finish(job: Job, writer: CaptureWriter, options: CaptureOptions, terminal: Terminal, seconds: float) -> None:
    tally = job.tally
    if tally.skipped:
        terminal.warn(f"{tally.skipped} calls with non-finite values were left out.")
    if tally.saturated:
        terminal.warn(f"{tally.saturated} calls hold float16 values at the limit of 65504.")
    if options.pth is not None:
        from capture.legacy import save_pth

        capture = Capture.open(writer.directory, allow_incomplete=bool(tally.failed))
        save_pth(options.pth, capture.calls())
        terminal.say(f"{options.pth}: the same calls as a list of keyword arguments.")
    share = tally.recording / job.running if job.running else 0.0
    ratio = f" ({tally.raw_bytes / tally.stored_bytes:.1f} x less)" if tally.stored_bytes else ""
    terminal.say(
        f"{options.capture}: {len(writer.stored)} prompts, {tally.calls} calls; {size(tally.raw_bytes)} heard, "
        f"{size(tally.stored_bytes)} stored{ratio}; {duration(seconds)}, of which recording {share:.1%}."
    )
    terminal.event(
        "done", prompts=len(writer.stored), calls=tally.calls, raw_bytes=tally.raw_bytes, stored_bytes=tally.stored_bytes,
        seconds=round(seconds, 3), recording_share=round(share, 5), failed=tally.failed,
    )  # fmt: skip
    if tally.failed:
        raise CaptureError(f"{options.capture}: {len(tally.failed)} prompts failed. Run again with --resume.", 1)
