"""Chooses which attention modules of a checkpoint ask its consumer for quantized attention, and in which type."""

from collections.abc import Sequence
from dataclasses import replace
from math import inf
from typing import Any

from torch import nn

from octavo.capture.errors import UsageError

from ..attention.choice import BELOW, chosen_rows
from ..attention.measure import AttentionRow
from ..result import Result
from . import TABLE, format_named
from .record import Format


def check_attention(formats: Sequence[str], attention: str, model: nn.Module | None = None) -> None:
    """Raises UsageError if `attention`, a value of `Settings.attention`, is "write" and one of `formats` cannot ask for
    quantized attention, or its consumer reads no such request in a denoiser of the class of `model`; None: any."""
    if attention != "write":
        return
    able = " or ".join(word for word in TABLE if format_named(word).attention)
    for record in map(format_named, formats):
        fact = "cannot ask for quantized attention"
        if not record.attention:
            raise UsageError(
                f"--attention write: format {record.name} {fact}. Use --format {able}, or --attention report."
            )
        names = [] if model is None else [name for name, _ in model.named_modules() if name]
        unread = record.unread(model, names) if model is not None else {}
        if names and len(unread) == len(names):
            reason = f"{names[0]} {unread[names[0]]}"
            raise UsageError(f"--attention write: format {record.name} {fact}: {reason}. Use --attention report.")


def written_rows(record: Format, model: nn.Module, rows: Sequence[AttentionRow]) -> dict[str, AttentionRow]:
    """Returns a dict from each attention module of `model` that is quantized in the format `record` to its row: the one
    with the highest SQNR among the types of the consumer, if that reaches the bound in every head. `rows` are the
    measured errors."""
    chosen = chosen_rows(rows, types=record.attention)
    unread = record.unread(model, list(chosen))
    return {module: row for module, row in chosen.items() if module not in unread}


def with_attention(result: Result, model: nn.Module, formats: Sequence[str]) -> Result:
    """Returns `result` with a report that says which type each attention module of `model` gets in each of `formats`;
    `result` itself if its attention stays float.

    The entry `attention` of the report gets the key `written`, a dict from format to a list with a dict for each
    attention module. Raises UsageError if a format cannot ask for quantized attention.

    | key      | content                                                                                           |
    |----------|---------------------------------------------------------------------------------------------------|
    | module   | name of the attention module                                                                      |
    | type     | the type that is written; null if the module stays float                                          |
    | rotation | the kind of the rotation of query and key; null if the module stays float                         |
    | worst    | SQNR in dB of the worst head in the best type that the consumer computes; null if there is none   |
    | reason   | why the module stays float; null if it is quantized                                               |
    """
    if not result.attention:
        return result
    check_attention(formats, "write")
    written = {name: _entries(format_named(name), model, result.attention) for name in formats}
    return replace(result, report={**result.report, "attention": {**result.report["attention"], "written": written}})


def _entries(record: Format, model: nn.Module, rows: Sequence[AttentionRow]) -> list[dict[str, Any]]:
    modules = list(dict.fromkeys(row.module for row in rows))
    written, unread = written_rows(record, model, rows), record.unread(model, modules)
    best = chosen_rows(rows, -inf, record.attention)
    entries = []
    for module in modules:
        row, reason = written.get(module), None
        if row is None:
            reason = unread.get(module)
            reason = reason or (BELOW if module in best else _refusal(module, rows, record))
        entries.append(
            {
                "module": module,
                "type": row and row.type,
                "rotation": row and row.rotation,
                "worst": best[module].worst if module in best else None,
                "reason": reason,
            }
        )
    return entries


def _refusal(module: str, rows: Sequence[AttentionRow], record: Format) -> str:
    """Returns why the consumer of the format `record` computes the attention `module` in none of its types."""
    own = [row for row in rows if row.module == module and row.type in record.attention]
    refusals = {row.type: str(row.refusal) for row in own}  # of the row with a rotation, which comes last
    return "; ".join(dict.fromkeys(refusals.values()))
