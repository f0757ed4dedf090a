"""Puts the result of `octavo compare` together for the page, and prints it."""

from collections.abc import Mapping, Sequence
from typing import Any

from octavo.capture.progress import duration
from octavo.capture.tensors import dtype_name

from ..comparing.comparison import Comparison
from ..comparing.gates import judged_gates
from ..comparing.machine import surroundings
from ..page.words import codes_of, gate_text, results_of, verdict
from ..terminal import Terminal, count_of
from .compare_options import CompareOptions

# what all checkpoints of a comparison share
_SHARED = ("model", "component", "pipeline", "surroundings", "prompts_source", "settings", "decoded", "note")


def contents_of(comparison: Comparison, options: CompareOptions, source: str) -> list[dict[str, Any]]:
    """Returns everything that the page of a comparison shows, except the pictures, as JSON-able values: one dict for
    each checkpoint. --json prints the same values. `source` is the prompt set or the file that the prompts are from."""
    shared = {
        "model": options.model,
        "component": comparison.sides[0].deployed.component,
        "pipeline": type(comparison.pipe).__name__,
        "surroundings": {
            "dtype": dtype_name(comparison.dtype),
            **surroundings(comparison.device, comparison.dtype),
        },
        "prompts_source": source,
        "settings": _settings(comparison.arguments) | {"seed": options.seed, "seeds": options.seeds},
        "decoded": comparison.decoded,
        "note": comparison.perceptual.note,
    }
    heat, contents = comparison.probe.heat(), []
    for index, (out, side) in enumerate(zip(options.checkpoints, comparison.sides, strict=True)):
        totals = comparison.totals(index)
        contents.append({
            **shared,
            "checkpoint": str(out),
            "runs_on": side.deployed.runs_on,
            "totals": totals,
            "gates": judged_gates(options.limits, totals, options.gate_by, side.samples, len(side.pairs)),
            "prompts": [pair.row for pair in side.pairs],
            "ranges": heat,
            "report": side.deployed.report,
        })  # fmt: skip
    return contents


def _settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in arguments.items()
        if isinstance(value, (str, int, float)) and name != "output_type"
    }


def show(
    contents: Sequence[Mapping[str, Any]], ranges: Mapping[str, Any], options: CompareOptions, terminal: Terminal,
    seconds: float,
) -> None:  # fmt: skip
    """Prints the result of a comparison, which took `seconds`: a table and a summary for people, or with --json events
    for programs. `contents` has the result of each checkpoint. `ranges`, which only --json prints, has the largest
    |input| of each layer of the float model in each denoising step."""
    first = contents[0]
    pairs = count_of(len(first["prompts"]), "prompt" if options.seeds == 1 else "pair")
    names = [codes_of(content) for content in contents] if len(contents) == 1 else [c["checkpoint"] for c in contents]
    columns = [results_of(content) for content in contents]
    labels = list(dict.fromkeys(label for column in columns for label in column))
    around = "; in brackets 95 % intervals" if len(first["prompts"]) > 1 else "; one pair gives no 95 % intervals"
    terminal.table(
        f"{pairs}, {' and '.join(names)} compared with float{around}",
        ["measure", *(names if len(contents) > 1 else ["value"])],
        [[label, *(column.get(label, "not measured") for column in columns)] for label in labels],
    )
    if first["note"]:
        terminal.say(first["note"])
    for content in contents:
        terminal.say((f"{content['checkpoint']}: " if len(contents) > 1 else "") + verdict(content))
        for gate in content["gates"]:
            if gate["passed"] and not gate["settled"]:
                terminal.say(f"Passed, but not settled: {gate_text(gate)}.")
    terminal.say(f"{options.output}: written, with pictures and numbers of {pairs}. Took {duration(seconds)}.")
    _show_events(contents, ranges, options, terminal, seconds)


def _show_events(
    contents: Sequence[Mapping[str, Any]], ranges: Mapping[str, Any], options: CompareOptions, terminal: Terminal,
    seconds: float,
) -> None:  # fmt: skip
    """Prints the events of --json. The last event, "done", has the numbers of the comparison. With several checkpoints,
    the numbers of each are a dict in the list `checkpoints` of this event. `ranges` has the largest |input| of each
    layer of the float model in each denoising step."""
    for content in contents:
        report = content["report"]
        layers, totals = report.get("layers", []), report.get("totals")
        terminal.event("layers", checkpoint=content["checkpoint"], layers=layers, totals=totals)
    terminal.event("ranges", **ranges)
    left_out = ("prompts", "ranges", "report")
    parts = [{key: value for key, value in content.items() if key not in left_out} for content in contents]
    done = parts[0]
    if len(parts) > 1:
        own = [{key: value for key, value in part.items() if key not in _SHARED} for part in parts]
        done = {key: parts[0][key] for key in _SHARED} | {"checkpoints": own}
    terminal.event("done", out=str(options.output), seconds=round(seconds, 3), **done)
