"""Runs `octavo compare`: draws the same prompts with the float and the quantized pipeline, and writes the pictures and
the measures of their difference onto one page."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from octavo.calibrate.errors import out_of_memory
from octavo.capture.devices import DTYPES, resolve_device
from octavo.capture.errors import DeviceError, OctavoError, StorageError, first_sentence
from octavo.capture.files import Modes, staging, write_bytes
from octavo.capture.progress import duration
from octavo.pipelines.family import Family
from octavo.pipelines.inspection import family_at
from octavo.pipelines.load import load_pipeline, model_directory
from octavo.pipelines.long_prompts import long_prompts
from octavo.pipelines.prompted import note_on_prompts
from octavo.pipelines.run import call_arguments
from octavo.pipelines.weights import stored_dtype
from octavo.prompts import read_prompts

from ..checkpoints import check_deployed, loras_of
from ..comparing.comparison import Comparison
from ..comparing.machine import surroundings
from ..joined_checkpoints import load_joined, places_in
from ..page import page
from ..page.words import codes_of, decibels, percent, speed_text, verdict
from ..terminal import Terminal, count_of, size
from .compare_options import CompareOptions

_SIDES = ("float", "int8")


def run(options: CompareOptions, terminal: Terminal) -> None:
    """Runs `octavo compare` with `options`. If the result misses a limit (--min-psnr, --min-sqnr), raises OctavoError
    (exit code 1) after the page is written."""
    began = time.monotonic()
    source = options.prompts or ("demo-heldout" if options.model == "demo" else "images")
    prompts = read_prompts(source)
    for warning in prompts.warnings:
        terminal.warn(warning)
    check_output(options.output, options.overwrite)
    checkpoint = model_directory(str(options.checkpoint))
    places = places_in(checkpoint, options.component)
    for warning in [note for place in places for note in check_deployed(place)]:
        terminal.warn(warning)
    directory = model_directory(options.model)
    family = family_at(directory)
    comparison = _comparison(options, directory, places, family, prompts.texts)
    texts = list(prompts.texts[: options.limit])
    pipe, arguments = comparison.pipe, comparison.arguments
    if note := note_on_prompts(pipe, arguments) or long_prompts(pipe, texts, arguments):
        terminal.warn(note)
    _run(comparison, texts, terminal)
    content = content_of(comparison, options, source)
    data = page(content, [(pair.exact, pair.other) for pair in comparison.pairs])
    write_bytes(options.output, data, Modes(options.group_readable).manifest)
    _show(content, options, terminal, time.monotonic() - began)
    terminal.say(f"Next: open {options.output} in a browser.")
    missed = [gate for gate in content["gates"] if not gate["passed"]]
    if missed:
        words = "; ".join(f"{g['name']} is {decibels(g['value'])}, below {decibels(g['bar'])}" for g in missed)
        raise OctavoError(f"{options.checkpoint}: {words}. Calibrate again with --accuracy balanced or best.")


def check_output(path: Path, overwrite: bool) -> None:
    """Raises StorageError if a page cannot be written to `path`, or if `path` exists without `overwrite`. Leaves no
    file behind."""
    if path.is_dir():
        raise StorageError(f"{path}: is a directory. Give the name of a file with -o.")
    if not path.parent.is_dir():
        raise StorageError(f"{path.parent}: no such directory. Create it, or choose another with -o.")
    if path.exists() and not overwrite:
        raise StorageError(f"{path}: already exists. Use --overwrite, or another name with -o.")
    with staging(path.parent):
        pass


def _comparison(
    options: CompareOptions, directory: Path, places: Sequence[Path], family: Family, prompts: Sequence[str]
) -> Comparison:
    """Loads the float pipeline and the quantized denoisers from the checkpoints `places`, and prepares their
    comparison. `directory` holds the float pipeline, of the model family `family`. `prompts` are all prompts of the set
    or file, even prompts that are not drawn, because embeddings given with --arg may have a row for each prompt."""
    device, settings = resolve_device(options.device), options.settings
    pipe = load_pipeline(
        directory, dtype=DTYPES[options.dtype] if options.dtype else None, device=device, family=family,
        text_encoder=options.text_encoder, trust_remote_code=options.trust_remote_code, loras=loras_of(places),
    )  # fmt: skip
    deployed = load_joined(pipe, places, options.component, device)
    folder = deployed.component.partition(" and ")[0].replace(".", "/")
    stored = deployed.report.get("dtype") or stored_dtype(directory / folder)
    arguments = call_arguments(pipe, family, settings, prompts)
    return Comparison(pipe, deployed, arguments, options.seed, DTYPES.get(stored or ""))


def _run(comparison: Comparison, texts: list[str], terminal: Terminal) -> None:
    """Compares the two pipelines on every prompt of `texts`. An exception that is no OctavoError is turned into an
    OctavoError that names the prompt."""
    number = 0
    try:
        comparison.probe_denoiser(texts[0])
        for number, text in enumerate(terminal.progress("prompts", texts, len(texts)), 1):
            terminal.event("prompt", number=number, **comparison.compare(text).row)
    except OctavoError:
        raise
    except Exception as error:
        where = f"prompt {max(number, 1)}"
        if (device := out_of_memory(error)) is not None:
            remedy = "Use a smaller --height and --width, or another --device"
            raise DeviceError(f"{where}: out of memory on {device}. {remedy}.") from error
        fact = first_sentence(error)
        remedy = "Change the options for the pipeline's call, such as --steps or --arg"
        raise OctavoError(f"{where}: {type(error).__name__}: {fact}. {remedy}.") from error


def content_of(comparison: Comparison, options: CompareOptions, source: str) -> dict[str, Any]:
    """Returns everything that the page of a comparison shows, except the pictures, as JSON-able values. --json prints
    the same values. `source` is the prompt set or the file that the prompts are from."""
    deployed, totals = comparison.deployed, comparison.totals()
    same = {"PSNR": totals["psnr"] is None, "SQNR": totals["output_same"]}
    limits = {"PSNR": (totals["psnr"], options.min_psnr), "SQNR": (totals["output_sqnr"], options.min_sqnr)}
    return {
        "model": options.model,
        "checkpoint": str(options.checkpoint),
        "component": deployed.component,
        "pipeline": type(comparison.pipe).__name__,
        "runs_on": deployed.runs_on,
        "surroundings": {
            "dtype": str(comparison.dtype).removeprefix("torch."),
            **surroundings(comparison.device, comparison.dtype),
        },
        "prompts_source": source,
        "settings": _settings(comparison.arguments) | {"seed": options.seed},
        "decoded": comparison.arguments.get("output_type") != "latent",
        "totals": totals,
        "gates": [
            {"name": name, "value": value, "bar": bar, "passed": same[name] or (value is not None and value >= bar)}
            for name, (value, bar) in limits.items()
            if bar is not None
        ],
        "prompts": [pair.row for pair in comparison.pairs],
        "ranges": comparison.probe.heat(),
        "report": deployed.report,
    }


def _settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in arguments.items()
        if isinstance(value, (str, int, float)) and name != "output_type"
    }


def _show(content: dict[str, Any], options: CompareOptions, terminal: Terminal, seconds: float) -> None:
    """Prints the result of a comparison, `content`, which took `seconds`: a table and a summary for people, or with
    --json events for programs."""
    totals = content["totals"]
    speed, bytes_, judged = totals["speed"], totals["size"], totals["judged"]
    codes = codes_of(content)
    rows = [["PSNR of the pictures", decibels(totals["psnr"])]]
    if totals["ssim"] is not None:
        rows.append(["SSIM of the pictures", f"{totals['ssim']:.4f}"])
    if totals["lpips"] is not None:
        rows.append(["LPIPS of the pictures", f"{totals['lpips']:.4f}"])
    if judged:
        names = zip(_SIDES, ("float", codes), strict=True)
        rows += [
            [f"pictures that show the prompt, {name}", f"{judged[side]} of {judged['of']}"] for side, name in names
        ]
    rows.append(["SQNR of the denoiser's output", decibels(totals["output_sqnr"])])
    if totals["latent_error"]:
        rows.append(["relative error of the final latents", percent(totals["latent_error"][-1]["median"])])
    rows += [
        [f"size of the denoiser ({bytes_['dtype']} to {codes})", f"{size(bytes_['float'])} to {size(bytes_['int8'])}"],
        [
            "seconds per prompt",
            f"{speed['float']:.2f} float, {speed['int8']:.2f} {codes} ({speed_text(speed['ratio'])})",
        ],
    ]
    prompts = count_of(len(content["prompts"]), "prompt")
    terminal.table(f"{prompts}, {codes} compared with float", ["measure", "value"], rows)
    if totals["lpips_note"]:
        terminal.say(totals["lpips_note"])
    terminal.say(verdict(content))
    terminal.say(f"{options.output}: written, with pictures and numbers of {prompts}. Took {duration(seconds)}.")
    terminal.event("layers", layers=content["report"].get("layers", []), totals=content["report"].get("totals"))
    terminal.event("ranges", **content["ranges"])
    rest = {key: value for key, value in content.items() if key not in ("prompts", "ranges", "report")}
    terminal.event("done", out=str(options.output), seconds=round(seconds, 3), **rest)
