"""Prints the error of quantized attention, from the entry `attention` of report.json."""

from typing import Any

from octavo.calibrate.attention.choice import attention_lines, counted
from octavo.calibrate.attention.rotations import NONE
from octavo.calibrate.report_file import calls_text

from ..terminal import Terminal, count_of


def show_attention(section: dict[str, Any], terminal: Terminal, most: int = 10) -> None:
    """Prints a table and a line from `section`, the entry `attention` of report.json. The table has the `most` modules
    with the lowest SQNR of a head; each type has a column without and one with a rotation of query and key. The line
    says how many modules reach the bound, with which type. If types are written, each format has a line instead, which
    says how many modules got which type, and why the others stay float."""
    rows: dict[str, dict[tuple[str, bool], dict[str, Any]]] = {}
    for row in section["rows"]:
        rows.setdefault(row["module"], {})[row["type"], row["rotation"] != NONE] = row
    columns = list(dict.fromkeys(key for cells in rows.values() for key in cells))
    order = sorted(rows, key=lambda module: min(map(_least, rows[module].values())))
    terminal.table(
        "Attention: lowest SQNR of a head if query, key and value are quantized (*: its consumer cannot)",
        ["module", *(f"{type}, rotated" if rotated else type for type, rotated in columns)],
        [[module, *(_cell(rows[module].get(column)) for column in columns)] for module in order[:most]],
    )
    if "written" not in section:
        terminal.say(
            f"Attention on {calls_text(section)}: {counted(section['types'].values())} of "
            f"{count_of(len(rows), 'module')} with at least {section['bound']:g} dB in every head."
        )
    for line in attention_lines(section):
        terminal.say(line)
    terminal.event("attention", **section)


def _least(row: dict[str, Any]) -> float:
    return float("inf") if row["worst"] is None else float(row["worst"])


def _cell(row: dict[str, Any] | None) -> str:
    """Returns the text of a cell; a star stands behind numbers of types that the consumer refuses for the module."""
    if row is None:
        return ""
    number = "no error" if row["worst"] is None else f"{row['worst']:.1f} dB (head {row['worst_head']})"
    return number if row["refusal"] is None else f"{number} *"
