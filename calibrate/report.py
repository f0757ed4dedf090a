"""The report: everything known about every layer after a calibration, as plain JSON."""

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .layers import QuantizedLayer
from .plan import Entry, Plan
from .scheme import Range

FORMAT = 1
NEVER_RAN = "never ran on these calls"
ZERO_INPUT = "its input was zero in every call"


class Stopwatch:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time of the block to the stage `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def peak_memory() -> int:
    """The largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def report_of(
    plan: Plan,
    layers: Mapping[str, QuantizedLayer],
    settings: Any,
    ranges: Mapping[str, Range],
    sqnr: Mapping[str, float | None],
    output_sqnr: float | None,
    calls: int,
    watch: Stopwatch,
) -> dict[str, Any]:
    """The content of report.json.

    | key         | content                                                                                          |
    |-------------|--------------------------------------------------------------------------------------------------|
    | layers      | of each plan entry: name, kind, shape, scheme (null: float), reason, bytes_before, bytes_after;  |
    |             | of a quantized one: weight_scale [smallest, largest], sqnr in dB (null: it has no error),        |
    |             | and range, scale, zero_point of its input (scheme W8A8_TIMESTEP: a list, one for each bin)       |
    | totals      | quantized, kept_float, bytes_before, bytes_after, output_sqnr in dB, calls                       |
    | seconds     | by stage                                                                                         |
    | peak_memory | bytes, of the whole process                                                                      |
    """
    rows = [_row(entry, layers.get(entry.name), ranges.get(entry.name), sqnr.get(entry.name)) for entry in plan.entries]
    return {
        "format": FORMAT,
        "settings": {
            "observer": settings.observer,
            "sigma": settings.sigma,
            "percentile": settings.percentile,
            "symmetric": settings.symmetric,
            "act_quant": settings.act_quant,
            "weights": settings.weights,
            "keep_float": list(settings.keep_float),
            "samples": settings.samples,
        },
        "layers": rows,
        "totals": {
            "quantized": len(layers),
            "kept_float": len(rows) - len(layers),
            "bytes_before": sum(row["bytes_before"] for row in rows),
            "bytes_after": sum(row["bytes_after"] for row in rows),
            "output_sqnr": output_sqnr,
            "calls": calls,
        },
        "warnings": warnings_of(plan),
        "seconds": {name: round(seconds, 3) for name, seconds in watch.seconds.items()},
        "peak_memory": peak_memory(),
    }


def _row(entry: Entry, layer: QuantizedLayer | None, extent: Range | None, sqnr: float | None) -> dict[str, Any]:
    before = entry.bytes
    row: dict[str, Any] = {
        "name": entry.name,
        "kind": entry.kind,
        "shape": list(entry.shape),
        "scheme": entry.scheme,
        "reason": entry.reason or None,
        "bytes_before": before,
        "bytes_after": before,
    }
    if layer is None:
        return row
    row["bytes_after"] = sum(tensor.nbytes for tensor in layer.state_dict().values())
    row["sqnr"] = None if sqnr is None else round(sqnr, 2)
    row["weight_scale"] = [layer.weight_scale.min().item(), layer.weight_scale.max().item()]
    row["scheme"] = layer.scheme
    if extent is not None:
        row["range"] = [extent.low, extent.high]
    if layer.calibrated:
        row["scale"], row["zero_point"] = layer.input_scale.tolist(), layer.input_zero_point.tolist()
    return row


def warnings_of(plan: Plan) -> list[str]:
    """One line for each layer that had to stay float though nobody asked for it, and one for each unsupported kind."""
    lines = []
    for entry in plan.entries:
        if entry.forced:
            lines.append(f"{entry.name}: {entry.reason}; it stays float.")
    kinds: dict[str, int] = {}
    for entry in plan.entries:
        if entry.unsupported:
            kinds[entry.reason] = kinds.get(entry.reason, 0) + 1
    lines += [f"{reason}: {count} stay float." for reason, count in sorted(kinds.items())]
    return lines


def worst(report: Mapping[str, Any], count: int = 10) -> list[dict[str, Any]]:
    """The quantized layers with the lowest SQNR, worst first."""
    rows = [row for row in report["layers"] if row.get("sqnr") is not None]
    return sorted(rows, key=lambda row: (row["sqnr"], row["name"]))[:count]
