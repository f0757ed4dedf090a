"""`octavo calibrate`: replays a capture through its model, chooses the integers, writes a checkpoint."""

import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from octavo.calibrate.byte_sizes import bytes_of
from octavo.calibrate.calibration import calibrate as calibrate_model
from octavo.calibrate.formats.export import check_activations, check_formats, export
from octavo.calibrate.formats.target import check_target
from octavo.calibrate.learning_curve import verdict
from octavo.calibrate.report import worst
from octavo.calibrate.result import Result
from octavo.calibrate.settings import RECIPES, Settings
from octavo.capture.devices import DTYPES, resolve_device
from octavo.capture.errors import MisfitError, UsageError
from octavo.capture.fingerprint import fingerprint
from octavo.capture.ranks import ALONE, Ranks
from octavo.capture.store.reader import Capture
from octavo.pipelines import FAMILIES, GENERIC
from octavo.pipelines.denoisers import denoisers
from octavo.pipelines.family import Family
from octavo.pipelines.load import load_pipeline, model_directory, quiet

from .page import PAGE_FILE, page
from .replayed import chosen_calls, replayed_calls
from .terminal import Terminal, duration, size
from .trajectory import Announced, Rerun, show_budget

_COLUMNS = ("range", "scale", "zero_point")  # of the report, in the table of the worst layers


@dataclass(frozen=True)
class CalibrateOptions:
    """The options of the command, by their names; `capture` is the model where `pipeline` is cnn."""

    capture: Path
    out: Path
    pipeline: str | None = None
    images: Path | None = None
    input_shape: str | None = None
    model: str | None = None
    component: str | None = None
    accuracy: str = "fast"
    observer: str | None = None
    sigma: float = 25.0
    symmetric: bool = False
    weight_only: bool = False
    activations: str | None = None
    smoothing: bool | None = None
    weights: tuple[str, ...] = ()
    bias_correction: bool | None = None
    keep_float: tuple[str, ...] = ()
    quantize_too: tuple[str, ...] = ()
    budget: str | None = None
    samples: int | None = None
    memory: str | None = None
    formats: str = "ascend"
    max_shard_size: str = "10GB"
    overwrite: bool = False
    allow_incomplete: bool = False
    allow_revision: bool = False
    config: Path | None = None
    device: str = "auto"
    dtype: str | None = None
    group_readable: bool = False
    trust_remote_code: bool = False


def run(options: CalibrateOptions, given: set[str], terminal: Terminal, ranks: Ranks) -> None:
    """The command; `given` are the options of the command line, which win over those of the config file."""
    began = time.monotonic()
    options = _configured(options, given)
    if options.pipeline is not None and options.memory is None:
        from .cnn_command import run_cnn

        if ranks.world > 1:
            raise UsageError(f"--pipeline {options.pipeline}: is the work of one process. Start one.")
        return run_cnn(options, terminal)
    if options.pipeline is not None:
        raise UsageError("--memory: is of denoisers. Leave it out with --pipeline cnn.")
    options = replace(options, device=ranks.connect(options.device))
    for name in ("images", "input_shape"):
        if getattr(options, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')}: is of --pipeline cnn alone. Leave it out.")
    bytes_of(options.max_shard_size, "--max-shard-size")
    if ranks.rank == 0:
        check_target(options.out, overwrite=options.overwrite)
    if graphs := [name for name in formats_of(options) if name.endswith("onnx")]:
        raise UsageError(f"--format {graphs[0]}: is of --pipeline cnn alone. Choose ascend.")
    capture = Capture.open(options.capture, allow_incomplete=options.allow_incomplete)
    component = _component(capture, options.component)
    family = FAMILIES.get(capture.manifest.get("family", ""), GENERIC)
    chosen = chosen_calls(capture, component, options.samples, terminal, ranks)
    if not chosen:
        raise MisfitError(f"{capture.directory}: holds no calls of '{component}'. Capture with more --steps.")
    settings = settings_of(options, family, len(chosen))
    calls = replayed_calls(capture, component, chosen, casting(capture, options.dtype))
    if options.memory is not None:
        from .big_command import run_big

        result = run_big(options, capture, component, family, calls, settings, terminal, ranks)
        ranks.wait()
        return show(result, options, terminal, time.monotonic() - began, ranks)
    model, rerun = _model(capture, component, options, family)
    progress = terminal.progress if rerun is None else Announced(terminal, rerun)
    result = calibrate_model(model, calls, settings, progress=progress, trajectory=rerun, ranks=ranks)
    result = replace(result, report=result.report | told(options, capture, component))
    if ranks.rank == 0:
        write(result, model, options, family)
    ranks.wait()
    show(result, options, terminal, time.monotonic() - began, ranks)


def told(options: CalibrateOptions, capture: Capture, component: str) -> dict[str, str]:
    """What the report says of the model: where it is, and which of its denoisers this is."""
    source = source_of(capture, options)
    return {"model": source if source == "demo" else str(Path(source).resolve()), "component": component}


def formats_of(options: CalibrateOptions) -> tuple[str, ...]:
    """The formats wanted. Raises UsageError for one that cannot be written."""
    names = tuple(name.strip() for name in options.formats.split(","))
    check_formats(names)
    return names


def write(result: Result, model: nn.Module, options: CalibrateOptions, family: Family = GENERIC) -> None:
    """Writes the checkpoint in the formats wanted, and the page of its report."""
    export(
        result, model, options.out, formats_of(options), overwrite=options.overwrite,
        group_readable=options.group_readable, files={PAGE_FILE: page({"report": result.report})},
        groups=family.groups, max_shard_size=options.max_shard_size,
    )  # fmt: skip


def _configured(options: CalibrateOptions, given: set[str]) -> CalibrateOptions:
    """The options with what the config file says, where the command line says nothing."""
    if options.config is None:
        return options
    from .commands.config_file import read_config

    known = {field.name for field in fields(options)} - {"capture", "out", "config"}
    read = read_config(options.config)
    return replace(options, **{name: value for name, value in read.items() if name in known and name not in given})


def _component(capture: Capture, wanted: str | None) -> str:
    """The denoiser to quantize: the one captured, or the one wanted of several."""
    there = list(capture.manifest.get("components", {}))
    if wanted is None and len(there) == 1:
        return there[0]
    if wanted is None or wanted not in there:
        fact = f"no calls of '{wanted}'" if wanted else f"holds calls of {len(there)} denoisers"
        raise UsageError(f"{capture.directory}: {fact}. Choose one of {', '.join(there)} with --component.")
    return wanted


def settings_of(options: CalibrateOptions, family: Family, samples: int | None = None) -> Settings:
    """The recipe, and what the options say otherwise. Raises UsageError where a format has no form for it."""
    defaults = family.keep_float
    if options.quantize_too and defaults is not None:
        unknown = [pattern for pattern in options.quantize_too if pattern not in defaults]
        if unknown:
            known = ", ".join(defaults)
            raise UsageError(f"--quantize: '{unknown[0]}' is not kept float by default. Choose of {known}.")
        defaults = {pattern: why for pattern, why in defaults.items() if pattern not in options.quantize_too}
    quantize = options.quantize_too if defaults is None else ()
    if options.accuracy not in RECIPES:
        raise UsageError(f"--accuracy: no '{options.accuracy}'. Choose one of {', '.join(RECIPES)}.")
    said = {
        "observer": options.observer, "activations": "float" if options.weight_only else options.activations,
        "smoothing": options.smoothing, "weights": options.weights or None, "bias_correction": options.bias_correction,
    }  # fmt: skip
    chosen = RECIPES[options.accuracy] | {name: value for name, value in said.items() if value is not None}
    made = Settings(
        sigma=options.sigma, symmetric=options.symmetric, groups=family.groups, keep_float=options.keep_float,
        defaults=defaults, more_float=family.more_float, quantize=quantize, samples=samples, budget=options.budget,
        release=True, name="--keep-float", **chosen,
    )  # fmt: skip
    check_activations(formats_of(options), made.activations)
    return made


def _model(
    capture: Capture, component: str, options: CalibrateOptions, family: Family
) -> tuple[nn.Module, Rerun | None]:
    """The denoiser that was captured, checked to be the one, in the dtype of the deployment; and runs for a budget."""
    captured = capture.manifest
    source = source_of(capture, options)
    pipe = load_pipeline(
        model_directory(source), dtype=DTYPES.get(captured.get("dtype", "")),
        family=FAMILIES.get(captured.get("family", "")), trust_remote_code=options.trust_remote_code,
    )  # fmt: skip
    module = denoisers(pipe, (component,))[component]
    check_fingerprint(capture, component, fingerprint(module), source, options.allow_revision)
    rerun = None
    if options.budget is not None:
        rerun = Rerun(pipe, capture, family)
        with quiet():
            pipe.to(resolve_device(options.device), DTYPES.get(options.dtype or ""))
    del pipe
    with quiet():
        module = module.to(DTYPES[options.dtype]) if options.dtype else module
    return module.to(resolve_device(options.device)).requires_grad_(False), rerun


def source_of(capture: Capture, options: CalibrateOptions) -> str:
    """Where the captured model is."""
    source = options.model or capture.manifest.get("model")
    if source is None:
        raise UsageError(f"{capture.directory}: does not say which model it is of. Give it with --model.")
    return str(source)


def check_fingerprint(capture: Capture, component: str, now: dict[str, str], source: str, allow_revision: bool) -> None:
    """Raises MisfitError when the model of the fingerprint `now` is not the one whose calls were captured."""
    was = capture.manifest["components"][component]
    if was["class"] != now["class"]:
        fact = f"was captured from {was['class']}; this model is {now['class']}"
    elif was["names"] != now["names"]:
        fact = f"was captured from a {was['class']} with other tensors than {source}"
    elif was["weights"] != now["weights"] and not allow_revision:
        revisions = f"rev {was['weights'][:8]}; this model is rev {now['weights'][:8]}"
        fact = f"was captured from {was['class']} {revisions} (--allow-revision accepts it)"
    else:
        return
    raise MisfitError(f"{capture.directory} {fact}. Give the captured model with --model.")


def casting(capture: Capture, dtype: str | None) -> Callable[[Any], Any]:
    """What brings the arguments of a call to the dtype of the deployment: those in the captured dtype change."""
    before, after = DTYPES.get(capture.manifest.get("dtype", "")), DTYPES.get(dtype or "")
    if after is None or before == after:
        return lambda value: value

    def cast(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(after) if value.dtype == before else value
        if isinstance(value, dict):
            return {key: cast(item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(map(cast, value))
        return value

    return cast


def show(result: Result, options: CalibrateOptions, terminal: Terminal, seconds: float, ranks: Ranks = ALONE) -> None:
    """The tables and lines for people, and the event for programs."""
    for warning in result.warnings:
        terminal.warn(warning)
    report = result.report
    totals, layers = report["totals"], report["layers"]
    reasons: dict[str, list[str]] = {}
    for row in layers:
        if row["scheme"] is None:
            reasons.setdefault(row["reason"], []).append(row["name"])
    terminal.table(
        "Kept float", ["layers", "why"],
        [[_some(names), why] for why, names in reasons.items()],
    )  # fmt: skip
    terminal.table(
        "Worst by SQNR", ["layer", "SQNR", "range", "scale", "zero point"],
        [
            [row["name"], f"{row['sqnr']:.1f} dB", *(_extent(row[key]) if key in row else "" for key in _COLUMNS)]
            for row in worst(report)
        ],
    )  # fmt: skip
    quality = (
        "" if totals["output_sqnr"] is None else f", output SQNR {totals['output_sqnr']:.1f} dB on calls it has seen"
    )
    if "budget" in report:
        show_budget(report, terminal)
    terminal.say(
        f"{options.out}: {totals['quantized']} layers in 8-bit integers, {totals['kept_float']} float{quality}; "
        f"{size(totals['bytes_before'])} of layers became {size(totals['bytes_after'])}; "
        f"{totals['calls']} calls, {duration(seconds)}, peak memory {size(report['peak_memory'])}."
    )
    if enough := verdict(report["enough"]):
        terminal.say(enough)
    terminal.event(
        "done", out=str(options.out), totals=totals, enough=report["enough"], seconds=round(seconds, 3),
        peak_memory=report["peak_memory"], ranks=ranks.world, sent=ranks.sent,
    )  # fmt: skip


def _extent(value: Any) -> str:
    """A number, or of several the smallest and the largest."""
    if isinstance(value, list):
        low, high = min(value), max(value)
        return f"{low:.3g}" if low == high else f"{low:.3g} .. {high:.3g}"
    return f"{value:.3g}"


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
