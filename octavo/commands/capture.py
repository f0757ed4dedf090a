"""`octavo capture`: runs a pipeline over prompts and stores what its denoisers are called with."""

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
from octavo.pipelines.prompted import note_on_prompts
from octavo.pipelines.run import call_arguments
from octavo.prompts import read_prompts

from ..terminal import Terminal, size
from .capture_job import Job
from .capture_options import CaptureOptions


def run(options: CaptureOptions, terminal: Terminal, ranks: Ranks) -> None:
    """Runs the command. Raises OctavoError, exit code 1, when `keep_going` left prompts out."""
    began = time.monotonic()
    device, settings = resolve_device(ranks.connect(options.device)), options.settings
    source = options.prompts or ("demo" if options.model == "demo" else "images")
    prompts = read_prompts(source)
    for warning in prompts.warnings:
        terminal.warn(warning)
    directory = model_directory(options.model)
    family = family_at(directory, options.pipeline)
    if ranks.rank == 0:
        prepare(options.capture, Modes(options.group_readable), options.resume)
        lock(options.capture).release()  # writable and free, before a model is loaded
    pipe = load_pipeline(
        directory, dtype=DTYPES[options.dtype] if options.dtype else None, device=device, family=family,
        text_encoder=options.text_encoder, offload=options.offload, strict=options.strict,
        trust_remote_code=options.trust_remote_code,
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
    }
    if note := note_on_prompts(pipe, arguments) or long_prompts(pipe, texts, arguments):
        terminal.warn(note)
    with CaptureWriter.create(
        options.capture, manifest, resume=options.resume, group_readable=options.group_readable, ranks=ranks
    ) as writer:
        job.capture(writer, texts)
    _finish(job, writer, options, terminal, time.monotonic() - began)


def _finish(job: Job, writer: CaptureWriter, options: CaptureOptions, terminal: Terminal, seconds: float) -> None:
    tally, stored = job.tally, len(writer.unit_names())
    if tally.skipped:
        terminal.warn(f"{tally.skipped} calls with non-finite values were left out.")
    if tally.saturated:
        terminal.warn(f"{tally.saturated} calls hold float16 values at the limit of 65504.")
    for name in job.modules if tally.heard else ():
        if name not in tally.heard:
            terminal.warn(f"{name} was never called and cannot be calibrated from this. Take more --steps.")
        elif name not in tally.stored:
            terminal.warn(f"No step of {name} is among those kept, so it cannot be calibrated. Keep more with --keep.")
    rule = job.keep.rule
    if rule.kind == "spread" and tally.steps and min(tally.steps) < rule.number:
        terminal.warn(f"--keep {options.keep}: a prompt took {min(tally.steps)} steps only; all of them are stored.")
    for name, count in tally.swapped.items():
        terminal.warn(swap_warning(name, count))
    if options.pth is not None and job.ranks.rank == 0:
        from octavo.capture.pth.pth import save_pth

        capture = Capture.open(writer.directory, allow_incomplete=bool(tally.failed))
        save_pth(options.pth, capture.calls())
        terminal.say(f"{options.pth}: the same calls as a list of keyword arguments.")
    share = tally.recording / tally.running if tally.running else 0.0
    ratio = f" ({tally.raw_bytes / tally.stored_bytes:.1f}x smaller)" if tally.stored_bytes else ""
    terminal.say(
        f"{options.capture}: {stored} prompts, {tally.calls} calls; {size(tally.raw_bytes)} of inputs, "
        f"{size(tally.stored_bytes)} on disk{ratio}; {duration(seconds)}, of which recording {share:.1%}."
    )
    terminal.event(
        "done", prompts=stored, calls=tally.calls, raw_bytes=tally.raw_bytes,
        stored_bytes=tally.stored_bytes, seconds=round(seconds, 3), recording_share=round(share, 5),
        failed=tally.failed,
    )  # fmt: skip
    job.ranks.wait()
    if tally.failed:
        raise OctavoError(f"{options.capture}: {len(tally.failed)} prompts failed. Run again with --resume.")
