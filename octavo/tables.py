"""Formats tables as text: as a grid if every row fits into the width of the terminal, otherwise as a list of rows."""

from textwrap import wrap
from typing import Literal

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

_FRAME = 3  # characters that a column adds to the width of a row: a line and two spaces


def grid_text(title: str, columns: list[str], rows: list[list[str]], console: Console) -> str:
    """Returns a table as a grid that is at most as wide as `console`. Columns of numbers are aligned right. Cells wrap
    between words only, and numbers do not wrap, unless the console is too narrow for that; `list_text` then returns the
    table as a list, and None otherwise."""
    table = Table(title=Text(title), title_justify="left", header_style="bold")
    cells_of = list(zip(*rows, strict=True))
    for column, cells, width in zip(columns, cells_of, _widths(columns, cells_of, console.width), strict=False):
        justify: Literal["left", "right"] = "right" if _numbers(cells) else "left"
        table.add_column(Text(column), justify=justify, overflow="fold", width=width)
    for row in rows:
        table.add_row(*map(Text, row))
    with console.capture() as output:
        console.print(table)
    return output.get().rstrip("\n")


def _widths(columns: list[str], cells_of: list[tuple[str, ...]], width: int) -> list[int]:
    """Returns the width of each column of a grid of `width` characters. Each gets its least width. What is left is
    divided evenly among the columns that need more, but none gets more than its longest cell."""
    pairs = list(zip(columns, cells_of, strict=False))
    widths = [_least_width(column, cells) for column, cells in pairs]
    needs = [max(map(cell_len, (column, *cells))) - least for (column, cells), least in zip(pairs, widths, strict=True)]
    left = max(0, width - 1 - sum(_FRAME + least for least in widths))
    for count, index in enumerate(sorted(range(len(needs)), key=needs.__getitem__)):
        more = min(needs[index], left // (len(needs) - count))
        widths[index] += more
        left -= more
    return widths


def list_text(title: str, columns: list[str], rows: list[list[str]], width: int) -> str | None:
    """Returns a table as a list: for each row its first cell on a line, and below it the names of the other columns,
    each followed by its cell.

    Returns None if a grid of `width` characters can show the table without breaking a word or a number.
    """
    cells_of = zip(columns, zip(*rows, strict=True), strict=False)
    if 1 + sum(_FRAME + _least_width(column, cells) for column, cells in cells_of) <= width:
        return None
    lines = [title]
    for first, *others in rows:
        named = [f"{name} {cell}" for name, cell in zip(columns[1:], others, strict=False) if cell]
        lines += _wrapped([first], width, "  ") + _wrapped(named, width, "    ")
    return "\n".join(lines)


def _least_width(column: str, cells: tuple[str, ...]) -> int:
    """Returns the least width of a column, in characters, that breaks no word of its heading `column` and of its
    `cells`. If the cells are numbers, such as "1.5 MiB", it breaks no whole cell."""
    parts = cells if _numbers(cells) else [word for cell in cells for word in cell.split()]
    return max(map(cell_len, [*column.split(), *parts]), default=0)


def _numbers(cells: tuple[str, ...]) -> bool:
    """Returns whether all `cells` of a column start as numbers do: with a digit or a minus sign."""
    return all(cell[:1].isdigit() or cell[:1] == "-" for cell in cells)


def _wrapped(parts: list[str], width: int, indent: str) -> list[str]:
    """Joins `parts` with commas and wraps them into lines of `width` characters. Each line begins with `indent`. A part
    is broken only if it is longer than a line."""
    line_width = width - len(indent)
    unbreakable = (part if cell_len(part) > line_width else part.replace(" ", "\xa0") for part in parts)
    text = ", ".join(unbreakable)
    lines = wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    return [line.replace("\xa0", " ") for line in lines]
