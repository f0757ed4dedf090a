"""Runs `octavo calibrate`: replays the calls in a capture, quantizes the denoiser, and writes a checkpoint."""

import time
from dataclasses import replace
from functools import partial

import diffusers
from torch import nn

from octavo.calibrate.byte_sizes import parse_size
from octavo.calibrate.calibration import calibrate as calibrate_model
from octavo.calibrate.calibration import planned
from octavo.calibrate.formats import format_named
from octavo.calibrate.formats.attention import check_attention, with_attention
from octavo.calibrate.formats.target import check_target, least_size
from octavo.calibrate.result import Result
from octavo.calibrate.settings import Settings
from octavo.capture.devices import DTYPES, resolve_device
from octavo.capture.errors import UsageError
from octavo.capture.fingerprint import Origin, fingerprint
from octavo.capture.ranks import Ranks
from octavo.capture.space import check_space
from octavo.capture.store.reader import Capture
from octavo.pipelines import FAMILIES, GENERIC
from octavo.pipelines.denoisers import denoisers
from octavo.pipelines.load import load_pipeline, model_directory, quiet
from octavo.pipelines.loras import parse_loras

from ..terminal import Terminal
from ..words import DENOISER_FORMATS
from .calibrate_options import CalibrateOptions, formats_of, settings_for, settings_of
from .calibrate_output import show, write
from .calibrate_several import calibrate_all
from .captured_model import Captured, casting, check_fingerprint, components_of, origin_of, source_of
from .replayed_calls import chosen_calls, replayed_calls
from .rerun import AnnouncedProgress, Rerun


def run(options: CalibrateOptions, terminal: Terminal, ranks: Ranks) -> None:
    """Runs `octavo calibrate` with `options`. If several processes run it, each is one of `ranks` and does a part of
    the work."""
    if options.pipeline is not None:
        from .calibrate_classifier import run_classifier

        return run_classifier(options, terminal, ranks)
    began = time.monotonic()
    options = replace(options, device=ranks.connect(options.device))
    _check(options, ranks)
    capture = Capture.open(options.capture, allow_incomplete=options.allow_incomplete)
    names = components_of(capture, options)
    if len(names) == 1:
        result = _calibrate(capture, names[0], options, terminal, ranks)
        ranks.wait()
        show(result, options, terminal, time.monotonic() - began, ranks)
        return terminal.next("inspect", options.out)
    calibrate_one = partial(_calibrate, capture, terminal=terminal, ranks=ranks)
    calibrate_all(capture, names, options, calibrate_one, terminal, ranks)
    terminal.say(f"{options.out}: holds {', '.join(names)}. octavo generate {options.out} uses all of them.")
    terminal.next("inspect", options.out)


def _calibrate(capture: Capture, component: str, options: CalibrateOptions, terminal: Terminal, ranks: Ranks) -> Result:
    """Calibrates the denoiser `component` of a capture. Only the first of `ranks` writes OUT, the directory of the
    checkpoint."""
    captured = _opened(capture, component, options, terminal, ranks)
    settings = settings_of(options, captured.family, captured.count)
    if options.memory is not None:
        from .calibrate_blockwise import calibrate_blockwise

        return calibrate_blockwise(options, captured, settings, terminal, ranks)
    return _calibrate_whole(options, captured, settings, terminal, ranks)


def _check(options: CalibrateOptions, ranks: Ranks) -> None:
    """Checks the options before any file is read. Raises UsageError for options and formats that only `octavo
    calibrate-cnn` takes, for a --max-shard-size that is no size, and for formats that cannot ask for quantized
    attention as --attention says. The first of `ranks` also raises StorageError if OUT cannot be written."""
    for name in ("images", "input_shape"):
        if getattr(options, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} only works with octavo calibrate-cnn. Remove it.")
    parse_size(options.max_shard_size, "--max-shard-size")
    if ranks.rank == 0:
        check_target(options.out, overwrite=options.overwrite)
    if others := [name for name in formats_of(options) if name not in DENOISER_FORMATS]:
        choices = ", ".join(DENOISER_FORMATS)
        raise UsageError(f"--format {others[0]} only works with octavo calibrate-cnn. Choose one of {choices}.")
    check_attention(formats_of(options), options.attention)


def _opened(capture: Capture, component: str, options: CalibrateOptions, terminal: Terminal, ranks: Ranks) -> Captured:
    """Returns the denoiser `component` of a capture with its model family and the calls to replay. Prints a warning if
    the capture does not say which model its calls are from, because it was converted from a .pth file."""
    family = FAMILIES.get(capture.manifest.get("family", ""), GENERIC)
    stored = component
    if not capture.manifest.get("components"):
        stored = capture.units[0].calls[0].component
        fact = "does not say which model its calls are from"
        source = source_of(capture, options)
        terminal.warn(f"{capture.directory}: {fact}. They are replayed through the {component} of {source}.")
    chosen = chosen_calls(capture, stored, options.samples, terminal, ranks)
    calls = replayed_calls(capture, stored, chosen, casting(capture, options.dtype))
    return Captured(capture, component, family, calls, len(chosen))


def _calibrate_whole(
    options: CalibrateOptions, captured: Captured, settings: Settings, terminal: Terminal, ranks: Ranks
) -> Result:
    """Calibrates `captured`, a model whose weights are all loaded at once (without --memory). Only the first of `ranks`
    writes OUT, the directory of the checkpoint."""
    model, rerun, origin = _model(captured, options, ranks)
    settings = settings_for(options, settings, model)
    check_space(options.out, least_size(model, planned(model, settings).quantized, len(formats_of(options))))
    progress = terminal.progress if rerun is None else AnnouncedProgress(terminal, rerun)
    result = calibrate_model(model, captured.calls, settings, progress=progress, trajectory=rerun, ranks=ranks)
    result = replace(result, report=result.report | origin_of(captured, options))
    result = with_attention(result, model, formats_of(options))
    if ranks.rank == 0:
        write(result, model, options, origin)
    return result


def _model(
    captured: Captured, options: CalibrateOptions, ranks: Ranks
) -> tuple[nn.Module, Rerun | None, Origin | None]:
    """Returns three things: the captured denoiser; a function that runs a few prompts of the capture again; and the
    fingerprint of the denoiser. The denoiser is cast to --dtype, the dtype in which the quantized model will run.

    The function is None without --budget. The fingerprint is that of the weights before the cast, and None on all but
    the first of `ranks`. Raises MisfitError if the denoiser is not the one that was captured, UsageError if the
    denoiser is not a model of diffusers and a format of --format holds only models of diffusers.
    """
    capture, component = captured.capture, captured.component
    manifest = capture.manifest
    source = source_of(capture, options)
    pipe = load_pipeline(
        model_directory(source), dtype=DTYPES.get(manifest.get("dtype", "")),
        family=FAMILIES.get(manifest.get("family", "")), trust_remote_code=options.trust_remote_code,
        loras=parse_loras(manifest.get("loras", [])),
    )  # fmt: skip
    module = denoisers(pipe, (component,))[component]
    for name in formats_of(options) if not isinstance(module, diffusers.ModelMixin) else ():
        if format_named(name).read is None:
            fact = f"only works with models of diffusers, and {component} is not one"
            raise UsageError(f"--format {name} {fact}. Choose ascend.")
    check_fingerprint(capture, component, fingerprint(module), source, options.allow_revision)
    origin = Origin.of(module) if ranks.rank == 0 else None
    rerun = None
    if options.budget is not None:
        rerun = Rerun(pipe, capture, captured.family)
        with quiet():
            pipe.to(resolve_device(options.device), DTYPES.get(options.dtype or ""))
    del pipe
    with quiet():
        module = module.to(DTYPES[options.dtype]) if options.dtype else module
    return module.to(resolve_device(options.device)).requires_grad_(False), rerun, origin
