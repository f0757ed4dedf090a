"""Tables in lines of text: as a grid where a row fits into the width, as a list of rows where it does not."""

from textwrap import wrap

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

_FRAME = 3  # characters that a column adds to the width of a row: a line and two spaces


def drawn_table(title: str, columns: list[str], rows: list[list[str]], console: Console) -> str:
    """A grid as wide as `console` at most; columns of numbers stand right and do not wrap."""
    table = Table(title=Text(title), title_justify="left", header_style="bold")
    for column, cells in zip(columns, zip(*rows, strict=True), strict=False):
        number = _numbers(cells)
        table.add_column(Text(column), justify="right" if number else "left", overflow="fold", no_wrap=number)
    for row in rows:
        table.add_row(*map(Text, row))
    with console.capture() as drawn:
        console.print(table)
    return drawn.get().rstrip("\n")


def listed(title: str, columns: list[str], rows: list[list[str]], width: int) -> str | None:
    """The rows below each other, the first cell in a line of its own and the others after the names of their columns;
    None where a grid of `width` characters breaks no word and no number."""
    needed = 1
    for column, cells in zip(columns, zip(*rows, strict=True), strict=False):
        parts = cells if _numbers(cells) else [word for cell in cells for word in cell.split()]
        needed += _FRAME + max(map(cell_len, [*column.split(), *parts]))
    if needed <= width:
        return None
    lines = [title]
    for first, *others in rows:
        named = [f"{name} {cell}" for name, cell in zip(columns[1:], others, strict=False) if cell]
        lines += _wrapped([first], width, "  ") + _wrapped(named, width, "    ")
    return "\n".join(lines)


def _numbers(cells: tuple[str, ...]) -> bool:
    return all(cell[:1].isdigit() or cell[:1] == "-" for cell in cells)


def _wrapped(parts: list[str], width: int, indent: str) -> list[str]:
    """Lines of `parts`, of which one is broken only where it is wider than a line."""
    room = width - len(indent)
    whole = (part if cell_len(part) > room else part.replace(" ", "\xa0") for part in parts)
    lines = wrap(", ".join(whole), width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    return [line.replace("\xa0", " ") for line in lines]
