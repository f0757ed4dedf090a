"""Runs `octavo compare`: draws the same prompts with the float and the quantized pipelines, and writes the pictures and
the measures of their difference onto one page."""

import time
from collections.abc import Sequence
from pathlib import Path

from octavo.calibrate.errors import out_of_memory
from octavo.capture.devices import DTYPES, resolve_device
from octavo.capture.errors import DeviceError, OctavoError, StorageError, UsageError, first_sentence
from octavo.capture.files import Modes, staging, write_bytes
from octavo.pipelines.inspection import family_at
from octavo.pipelines.load import load_pipeline, model_directory
from octavo.pipelines.long_prompts import long_prompts
from octavo.pipelines.prompted import note_on_prompts
from octavo.pipelines.run import call_arguments
from octavo.pipelines.weights import stored_dtype
from octavo.prompts import read_prompts

from ..checkpoints import check_deployed, loras_of
from ..comparing.comparison import Comparison, judgeable
from ..comparing.gates import judged_gates, meets
from ..comparing.perceptual import can_measure_lpips
from ..joined_checkpoints import load_joined, places_in
from ..page import page
from ..page.words import MEASURES, gate_text
from ..terminal import Terminal, count_of
from .compare_options import CompareOptions
from .compare_output import contents_of, show


def run(options: CompareOptions, terminal: Terminal) -> None:
    """Runs `octavo compare` with `options`. If the result misses a limit, such as --min-psnr, raises OctavoError (exit
    code 1) after the page is written."""
    began = time.monotonic()
    source = options.prompts or ("demo-heldout" if options.model == "demo" else "images")
    prompts = read_prompts(source)
    for warning in prompts.warnings:
        terminal.warn(warning)
    texts = list(prompts.texts[: options.limit])
    check_output(options.output, options.overwrite)
    check_limits(options, texts)
    places = [places_in(model_directory(str(out)), options.component) for out in options.checkpoints]
    for warning in [note for part in places for place in part for note in check_deployed(place)]:
        terminal.warn(warning)
    comparison = _comparison(options, places, prompts.texts)
    pipe, arguments = comparison.pipe, comparison.arguments
    if note := note_on_prompts(pipe, arguments) or long_prompts(pipe, texts, arguments):
        terminal.warn(note)
    _run(comparison, texts, options, terminal)
    contents = contents_of(comparison, options, source)
    pairs = zip(*(side.pairs for side in comparison.sides), strict=True)
    data = page(contents, [(sides[0].exact, *(pair.other for pair in sides)) for sides in pairs])
    write_bytes(options.output, data, Modes(options.group_readable).manifest)
    show(contents, comparison.probe.heat(), options, terminal, time.monotonic() - began)
    terminal.say(f"Next: open {options.output} in a browser.")
    _refuse_missed(contents)


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


def check_limits(options: CompareOptions, prompts: Sequence[str]) -> None:
    """Raises UsageError for a checkpoint that is given twice, and for a limit on what cannot be measured. Such limits
    are one on LPIPS if neither the package of LPIPS nor that of ST-LPIPS is installed, and --min-judged if none of
    `prompts` is a prompt of the bundled pipeline, because only these pictures can be judged."""
    if len(set(options.checkpoints)) < len(options.checkpoints):
        raise UsageError("OUT: a checkpoint is given twice. Give it once.")
    wanted = {limit.option for limit in options.limits}
    if "--max-lpips" in wanted and not can_measure_lpips():
        option = "--preset" if options.max_lpips is None else "--max-lpips"
        raise UsageError(f"{option}: needs LPIPS or ST-LPIPS. Run pip install 'octavo[metrics]'.")
    if "--min-judged" in wanted and not any(map(judgeable, prompts)):
        raise UsageError(
            "--min-judged: only prompts of the bundled model demo can be judged. Use --preset or --min-psnr."
        )


def _comparison(options: CompareOptions, places: Sequence[Sequence[Path]], prompts: Sequence[str]) -> Comparison:
    """Loads the float pipeline and the quantized denoisers, and prepares their comparison. `places` has the checkpoints
    of each OUT. `prompts` are all prompts of the set or file, even those that are not drawn, because embeddings given
    with --arg may have a row for each of them.

    Raises UsageError if two OUTs hold different LoRAs, so that no float model belongs to both."""
    directory, device = model_directory(options.model), resolve_device(options.device)
    family, loras = family_at(directory), loras_of(places[0])
    for out, part in zip(options.checkpoints, places, strict=True):
        if loras_of(part) != loras:
            raise UsageError(f"{out}: holds other LoRAs than {options.checkpoints[0]}. Compare them one at a time.")
    pipe = load_pipeline(
        directory, dtype=DTYPES[options.dtype] if options.dtype else None, device=device, family=family,
        text_encoder=options.text_encoder, trust_remote_code=options.trust_remote_code, loras=loras,
    )  # fmt: skip
    deployed = [load_joined(pipe, part, options.component, device) for part in places]
    folder = deployed[0].component.partition(" and ")[0].replace(".", "/")
    stored = deployed[0].report.get("dtype") or stored_dtype(directory / folder)
    arguments = call_arguments(pipe, family, options.settings, prompts)
    return Comparison(pipe, deployed, arguments, options.seed, DTYPES.get(stored or ""))


def _run(comparison: Comparison, texts: list[str], options: CompareOptions, terminal: Terminal) -> None:
    """Compares the pipelines on every prompt of `texts`, with all of its seeds. An exception that is no OctavoError is
    turned into an OctavoError that names the prompt."""
    position = 0
    jobs = [(index, text, number) for number in range(options.seeds) for index, text in enumerate(texts)]
    try:
        comparison.probe_denoiser(texts[0])
        label, note = "prompts" if options.seeds == 1 else "pairs", lambda: _unsettled(comparison, options)
        for count, (index, text, number) in enumerate(terminal.progress(label, jobs, len(jobs), note), 1):
            position = index
            for out, pair in zip(options.checkpoints, comparison.compare(text, number), strict=True):
                terminal.event("prompt", number=count, checkpoint=str(out), **pair.row)
    except OctavoError:
        raise
    except Exception as error:
        where = f"prompt {position + 1}"
        if (device := out_of_memory(error)) is not None:
            remedy = "Use a smaller --height and --width, or another --device"
            raise DeviceError(f"{where}: out of memory on {device}. {remedy}.") from error
        fact = first_sentence(error)
        remedy = "Change the options for the pipeline's call, such as --steps or --arg"
        raise OctavoError(f"{where}: {type(error).__name__}: {fact}. {remedy}.") from error


def _unsettled(comparison: Comparison, options: CompareOptions) -> str:
    """Returns a text for the progress display, on the limits that the user set: which measure needs the most further
    pairs until its interval lies on one side of its limit, and about how many. Returns "" if no limit is set, and
    before the second prompt."""
    needs = [
        (gate["more"], MEASURES[gate["key"]])
        for side in comparison.sides
        if options.limits and side.samples > 1
        for gate in judged_gates(options.limits, side.totals(), options.gate_by, side.samples, len(side.pairs))
        if gate["more"] is not None
    ]
    if not needs:
        return ""
    more, name = max(needs)
    return f"{name}: about {count_of(more, 'more pair')} would settle the limit" if more else "all limits are settled"


def _refuse_missed(contents: Sequence[dict]) -> None:
    """Raises OctavoError if a checkpoint misses a limit. `contents` has the result of each checkpoint; the message is
    one line."""
    missed = [(content["checkpoint"], gate) for content in contents for gate in content["gates"] if not gate["passed"]]
    if missed:
        names = dict.fromkeys(name for name, _ in missed)
        lines = [f"{name}: {'; '.join(gate_text(gate) for out, gate in missed if out == name)}" for name in names]
        # a limit that the estimate meets is missed for lack of pairs
        few = all(
            gate["more"] and gate["by"] == "worst" and meets(gate["value"], gate["bar"], gate["at_most"])
            for _, gate in missed
        )
        remedy = (
            "Draw more pairs with --limit or --seeds" if few else "Calibrate again with --accuracy balanced or best"
        )
        raise OctavoError(f"{'. '.join(lines)}. {remedy}.")
