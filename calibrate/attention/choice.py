"""Chooses the type of attention of each module under a bound, and makes the part of report.json on attention."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..report_file import calls_text
from .measure import AttentionRow
from .names import ATTENTION_TYPES, BOUND

BELOW = "below the bound"  # reason of modules that stay float for their error


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
    rows: Sequence[AttentionRow],
    calls: int,
    bound: float = BOUND,
    types: Sequence[str] = ATTENTION_TYPES,
    *,
    held_out: int = 0,
) -> dict[str, Any]:
    """Returns the entry `attention` of report.json.

    | key      | content                                                                                           |
    |----------|---------------------------------------------------------------------------------------------------|
    | bound    | the least SQNR of the worst head, in dB, of an attention that is quantized                        |
    | calls    | the number of calls measured                                                                      |
    | held_out | the number of these calls that are held out from the choice of the other numbers                  |
    | types    | dict from module to the type that reaches the bound; modules without one are left out             |
    | rows     | for each module, type and rotation: module, type, rotation, width (channels of a head), heads     |
    |          | (SQNR in dB of each head, null: no error), worst (the lowest SQNR), worst_head (its position),    |
    |          | refusal (why the consumer does not compute it so, or null)                                        |
    """
    return {
        "bound": bound,
        "calls": calls,
        "held_out": held_out,
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


def attention_lines(section: Mapping[str, Any]) -> list[str]:
    """Returns a line for each format in which types of attention are written: how many modules have which type, and
    what the others have. `section` is the entry `attention` of report.json."""
    return [_line(name, entries, section) for name, entries in section.get("written", {}).items()]


def _line(name: str, entries: Sequence[Mapping[str, Any]], section: Mapping[str, Any]) -> str:
    """Returns the line for the format `name`. Modules that stay float for the same reason are counted together; those
    below the bound with their lowest and highest SQNR."""
    mixed = counted(entry["type"] for entry in entries if entry["type"])
    text = f"Attention in format {name}: {mixed} of {len(entries)} modules with at least {section['bound']:g} dB in "
    text += f"every head on {calls_text(section)}"
    low = sorted(entry["worst"] for entry in entries if entry["reason"] == BELOW)
    others = [f"{len(low)} with {low[0]:.1f} to {low[-1]:.1f} dB"] if low else []
    reasons = Counter(entry["reason"] for entry in entries if entry["reason"] not in (None, BELOW))
    others += [f"{count} because it {reason}" for reason, count in reasons.items()]
    return f"{text}; float: {', '.join(others)}." if others else f"{text}."


def counted(types: Iterable[str]) -> str:
    """Returns how often each of `types` occurs, in words, such as "2 FP8_DYNAMIC, 1 MXFP8_DYNAMIC"."""
    return ", ".join(f"{count} {type}" for type, count in sorted(Counter(types).items())) or "none"
