"""Runs `octavo capture`: runs a pipeline over prompts and stores the arguments of its denoisers' calls."""

import time

from octavo.capture.devices import DTYPES, resolve_device
from octavo.capture.errors import OctavoError
from octavo.capture.files import Modes
from octavo.capture.fingerprint import fingerprint
from octavo.capture.locks import lock
from octavo.capture.progress import duration
from octavo.capture.ranks import Ranks
from octavo.capture.recorder import swap_warning
from octavo.capture.store.directory import prepare
from octavo.capture.store.reader import Capture
from octavo.capture.store.writer import CaptureWriter
from octavo.pipelines.denoisers import denoisers
from octavo.pipelines.inspection import family_at
from octavo.pipelines.load import load_pipeline, model_directory
from octavo.pipelines.long_prompts import long_prompts
from octavo.pipelines.loras import parse_loras
from octavo.pipelines.prompted import note_on_prompts
from octavo.pipelines.run import call_arguments
from octavo.prompts import read_prompts

from ..terminal import Terminal, count_of, size
from .capture_job import Job
from .capture_options import CaptureOptions
from .next_command import after_capture


def run(options: CaptureOptions, terminal: Terminal, ranks: Ranks) -> None:
    """Runs `octavo capture` with `options`. With --keep-going, raises OctavoError (exit code 1) at the end if any
    prompt failed."""
    began = time.monotonic()
    device, settings = resolve_device(ranks.connect(options.device)), options.settings
    source = options.prompts or ("demo" if options.model == "demo" else "images")
    prompts = read_prompts(source)
    for warning in prompts.warnings:
        terminal.warn(warning)
    directory, loras = model_directory(options.model), parse_loras(options.loras)
    family = family_at(directory, options.pipeline)
    if ranks.rank == 0:
        prepare(options.capture, Modes(options.group_readable), options.resume)
        lock(options.capture).release()  # check that CAPTURE can be written and locked before the model is loaded
    pipe = load_pipeline(
        directory, dtype=DTYPES[options.dtype] if options.dtype else None, device=device, family=family,
        text_encoder=options.text_encoder, offload=options.offload, strict=options.strict,
        trust_remote_code=options.trust_remote_code, loras=loras,
    )  # fmt: skip
    modules = denoisers(pipe, options.components)
    arguments = call_arguments(pipe, family, settings, prompts.texts)
    job = Job(pipe, modules, arguments, settings, options, terminal, ranks)
    texts = list(prompts.texts[: options.limit])
    manifest = {
        "model": str(directory.resolve()) if options.model != "demo" else "demo",
        "pipeline": type(pipe).__name__,
        "family": family.name,
        "components": {name: fingerprint(module) for name, module in modules.items()},
        "dtype": str(next(iter(modules.values())).dtype).removeprefix("torch."),
        "settings": settings.as_dict() | {"steps": job.steps, "keep": options.keep, "dropped": sorted(options.dropped)},
        "prompts": len(texts),
        "prompts_source": source,
    } | ({"loras": [str(lora) for lora in loras]} if loras else {})
    if note := note_on_prompts(pipe, arguments) or long_prompts(pipe, texts, arguments):
        terminal.warn(note)
    with CaptureWriter.create(
        options.capture, manifest, resume=options.resume, group_readable=options.group_readable, ranks=ranks
    ) as writer:
        job.capture(writer, texts)
    _finish(job, writer, options, terminal, time.monotonic() - began)


def _warn(job: Job, options: CaptureOptions, terminal: Terminal) -> None:
    tally = job.tally
    if tally.skipped:
        terminal.warn(f"Left out {count_of(tally.skipped, 'call')} with NaN or Inf (--nonfinite skip).")
    if tally.saturated:
        fact = "with float16 values at the limit of 65504, which may have overflowed"
        terminal.warn(f"Recorded {count_of(tally.saturated, 'call')} {fact}.")
    for name in job.modules if tally.called else ():
        if name not in tally.called:
            terminal.warn(f"{name} was never called, so this capture cannot calibrate it. Use more --steps.")
        elif name not in tally.stored:
            fact = f"--keep {options.keep} keeps no step in which {name} is called"
            terminal.warn(f"{fact}, so this capture cannot calibrate it. Keep more steps with --keep.")
    rule = job.keep.rule
    if rule.kind == "spread" and tally.steps and min(tally.steps) < rule.number:
        terminal.warn(f"--keep {options.keep}: a prompt took only {min(tally.steps)} steps; all of them are stored.")
    for name, count in tally.swapped.items():
        terminal.warn(swap_warning(name, count))


def _finish(job: Job, writer: CaptureWriter, options: CaptureOptions, terminal: Terminal, seconds: float) -> None:
    """Prints warnings and the summary of a capture, which took `seconds`. With --pth, also writes the captured
    arguments to a .pth file."""
    tally, stored = job.tally, len(writer.unit_names())
    _warn(job, options, terminal)
    if options.pth is not None and job.ranks.rank == 0:
        from octavo.capture.pth.pth import save_pth

        capture = Capture.open(writer.directory, allow_incomplete=bool(tally.failed))
        save_pth(options.pth, capture.calls())
        terminal.say(f"{options.pth}: written, with the keyword arguments of the same calls.")
    share = tally.recording / tally.running if tally.running else 0.0
    ratio = f" ({tally.raw_bytes / tally.stored_bytes:.1f}x smaller)" if tally.stored_bytes else ""
    terminal.say(
        f"{options.capture}: {count_of(stored, 'prompt')}, {count_of(tally.calls, 'call')}; "
        f"{size(tally.raw_bytes)} of inputs, {size(tally.stored_bytes)} on disk{ratio}; "
        f"{duration(seconds)}, {share:.1%} of it for recording."
    )
    terminal.event(
        "done", prompts=stored, calls=tally.calls, raw_bytes=tally.raw_bytes,
        stored_bytes=tally.stored_bytes, seconds=round(seconds, 3), recording_share=round(share, 5),
        failed=tally.failed,
    )  # fmt: skip
    job.ranks.wait()
    if tally.failed:
        failed = count_of(len(tally.failed), "prompt")
        raise OctavoError(f"{options.capture}: {failed} failed. Run again with --resume.")
    after_capture(options.capture, terminal)
