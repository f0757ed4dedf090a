"""Chooses the type of attention of each module under a bound, and makes the part of report.json on attention."""

from collections.abc import Iterable, Sequence
from typing import Any

from .measure import AttentionRow
from .names import ATTENTION_TYPES, BOUND


def chosen_rows(
    rows: Iterable[AttentionRow], bound: float = BOUND, types: Sequence[str] = ATTENTION_TYPES
) -> dict[str, AttentionRow]:
    """Chooses, for each attention module, the row of `rows` with the highest SQNR of the worst head. Only rows count
    that have one of `types`, reach `bound`, in dB, and have no refusal, the reason why the software that loads the
    checkpoint would not compute the module so. Among equal rows the first is chosen; for a type it is the row without a
    rotation. Returns a dict from module name to row, without the modules that have no such row."""
    chosen: dict[str, AttentionRow] = {}
    for row in rows:
        if row.type not in types or row.refusal is not None or _least(row) < bound:
            continue
        if row.module not in chosen or _least(row) > _least(chosen[row.module]):
            chosen[row.module] = row
    return chosen


def attention_types(
    rows: Iterable[AttentionRow], bound: float = BOUND, types: Sequence[str] = ATTENTION_TYPES
) -> dict[str, str]:
    """Returns a dict from the name of each attention module that can be quantized to its type: that of `types` with the
    highest SQNR of the worst head. Modules in which no type reaches `bound`, in dB, are left out."""
    return {module: row.type for module, row in chosen_rows(rows, bound, types).items()}


def _least(row: AttentionRow) -> float:
    return float("inf") if row.worst is None else row.worst


def attention_section(
    rows: Sequence[AttentionRow], calls: int, bound: float = BOUND, types: Sequence[str] = ATTENTION_TYPES
) -> dict[str, Any]:
    """Returns the entry `attention` of report.json.

    | key   | content                                                                                              |
    |-------|------------------------------------------------------------------------------------------------------|
    | bound | the least SQNR of the worst head, in dB, of an attention that is quantized                           |
    | calls | the number of calls measured                                                                         |
    | types | dict from module to the type that reaches the bound; modules without one are left out                |
    | rows  | for each module, type and rotation: module, type, rotation, width (channels of a head), heads (SQNR  |
    |       | in dB of each head, null: no error), worst (the lowest SQNR), worst_head (its position), refusal     |
    |       | (why the consumer does not compute it so, or null)                                                   |
    """
    return {
        "bound": bound,
        "calls": calls,
        "types": attention_types(rows, bound, types),
        "rows": [
            {
                "module": row.module,
                "type": row.type,
                "rotation": row.rotation,
                "width": row.width,
                "heads": list(row.heads),
                "worst": row.worst,
                "worst_head": row.worst_head,
                "refusal": row.refusal,
            }
            for row in rows
        ],
    }
