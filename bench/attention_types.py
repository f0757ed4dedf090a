"""Measures the error of quantized attention on the bundled pipeline, with or without added outliers.

    python -m bench.attention_types [--outliers] [--held 2] [--layers dynamic] [--bounds 36 40] [--rows 16 64]

With --outliers, two channels of every key are 16 times as large and those of the query as much smaller, which changes
no score. The first table has a row for each type of attention, with and without a rotation of query and key: the SQNR
in dB of the worst head, the median over all heads and modules, and the SQNR of the transformer's output if only the
attention is quantized. With --layers, it has the SQNR with W8A8 (static) and W8A8_DYNAMIC (dynamic) layers too, with
the float and with the quantized attention. All are measured on calls of held-out prompts. With --bounds, a second table
has the number of attention modules that reach each bound, and the SQNR of the output if these are quantized. With
--rows, a third table has the largest change of a head's SQNR if only so many query rows of a call are measured.
"""

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from octavo.calibrate.attention.choice import chosen_rows
from octavo.calibrate.attention.measure import AttentionRow, attention_errors, quantized_attention
from octavo.calibrate.attention.names import ATTENTION_TYPES
from octavo.calibrate.calibration import calibrate
from octavo.calibrate.settings import Settings
from octavo.pipelines.sd3 import SD3
from octavo.prompts import read_prompts

from .accuracy import demo_pipeline, recorded, sqnr


def table_of_types(model: nn.Module, rows: Sequence[AttentionRow], calls: list[Any], layers: dict[str, Any]) -> None:
    """Prints a row for each type and rotation. `layers` is a dict from name to integer layers of the whole model."""
    float_attention = {name: sqnr(model, chosen, calls) for name, chosen in layers.items()}
    cells = " | ".join(f"{name}: {value:.2f} dB" for name, value in float_attention.items())
    print(f"| type | rotation | worst head | median | output | {cells} |\n|---|---|---|---|---|" + "---|" * len(layers))
    for type in dict.fromkeys(row.type for row in rows):
        for rotated in (False, True):
            part = [row for row in rows if row.type == type and row.rotated == rotated]
            heads = [head for row in part for head in row.heads if head is not None]
            outputs = [
                f"{sqnr(model, chosen, calls, quantized_attention(model, part)):.2f} dB"
                for chosen in ({}, *layers.values())
            ]
            worst, middle = min(heads), statistics.median(heads)
            print(f"| {type} | {part[0].rotation} | {worst:.1f} | {middle:.1f} | {' | '.join(outputs)} |", flush=True)


def table_of_bounds(
    model: nn.Module, rows: Sequence[AttentionRow], calls: list[Any], layers: dict[str, Any], bounds: Sequence[float]
) -> None:
    """Prints the SQNR of the output for each type and bound, if the modules that reach the bound are quantized."""
    print(f"| type | bound | modules | output | {' | '.join(layers)} |\n|---|---|---|---|" + "---|" * len(layers))
    for type in dict.fromkeys(row.type for row in rows):
        for bound in bounds:
            part = chosen_rows(rows, bound, [type]).values()
            outputs = [
                f"{sqnr(model, chosen, calls, quantized_attention(model, part)):.2f} dB"
                for chosen in ({}, *layers.values())
            ]
            print(f"| {type} | {bound:g} dB | {len(part)} | {' | '.join(outputs)} |", flush=True)


def table_of_rows(model: nn.Module, rows: Sequence[AttentionRow], calls: list[Any], counts: Sequence[int]) -> None:
    """Prints how much the SQNR of a head changes at most if fewer query rows are measured."""
    print("| query rows | largest change of a head's SQNR |\n|---|---|")
    for count in counts:
        fewer = attention_errors(model, calls, list(dict.fromkeys(row.type for row in rows)), most_rows=count)
        pairs = zip(rows, fewer, strict=True)
        change = max(abs(a - b) for one, other in pairs for a, b in zip(one.heads, other.heads, strict=True) if a and b)
        print(f"| {count} | {change:.2f} dB |", flush=True)


def put_outliers(model: nn.Module, factor: float = 16.0) -> None:
    """Multiplies two channels of every key head of an SD3 transformer by `factor`, a power of two, and divides those of
    the query by it, which changes no score. The channels differ from head to head as little as real ones do: not at
    all, because the norm that is changed has the same weights for all heads."""
    for name, module in model.named_modules():
        end = name.rpartition(".")[2]
        if end in ("norm_k", "norm_added_k", "norm_q", "norm_added_q"):
            with torch.no_grad():
                module.weight[3:5].mul_(factor if "k" in end else 1 / factor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outliers", action="store_true")
    parser.add_argument("--layers", nargs="*", choices=["static", "dynamic"], default=[])
    parser.add_argument("--types", nargs="*", choices=ATTENTION_TYPES, default=list(ATTENTION_TYPES))
    parser.add_argument("--bounds", nargs="*", type=float, default=[])
    parser.add_argument("--held", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rows", nargs="*", type=int, default=[])
    options = parser.parse_args()
    pipe = demo_pipeline(outliers=False)
    model = pipe.transformer
    if options.outliers:
        put_outliers(model)
    held_out = recorded(pipe, list(read_prompts("demo-heldout").texts)[-options.held :], options.steps)
    rows = attention_errors(model, held_out, options.types, most_rows=1 << 20)
    layers: dict[str, Any] = {}
    if options.layers:
        calls = recorded(pipe, list(read_prompts("demo").texts[: options.prompts]), options.steps)
        for name in options.layers:
            settings = Settings(defaults=SD3.keep_float, groups=SD3.groups, sqnr_calls=0, activations=name)
            layers[name] = calibrate(model, lambda: calls, settings).layers
    table_of_types(model, rows, held_out, layers)
    if options.bounds:
        table_of_bounds(model, rows, held_out, layers, options.bounds)
    if options.rows:
        table_of_rows(model, rows, held_out, options.rows)


if __name__ == "__main__":
    main()
