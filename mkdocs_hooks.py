"""Prepares the pages of docs/ for the site. The pages are written for GitHub, whose rules for lists differ from those
of Python-Markdown, which builds the site.

GitHub lets a list begin right after a line of text, and indents the lines of an item by two or three spaces.
Python-Markdown needs a blank line before a list and an indentation of four.

On the page of the commands, the comment `HELP` is replaced by the help of every command.
"""

import re
from collections.abc import Iterator
from typing import Any

ITEM = re.compile(r"(?P<marker>[-*]|\d+\.) +(?P<text>.*)")
HELP = "<!-- help of the commands -->"
COLUMNS = 92  # width of the help


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Returns the text of a page as Python-Markdown needs it, with the help of the commands in place of the comment
    `<!-- help of the commands -->`. mkdocs calls this function for each page."""
    text = with_spaced_lists(markdown)
    return text.replace(HELP, "\n".join(help_of_commands())) if HELP in text else text


def with_spaced_lists(markdown: str) -> str:
    """Returns the text of a page with a blank line before each list, and four spaces before the further lines of an
    item."""
    lines: list[str] = []
    inside = False  # whether the line before belongs to a list
    for line in markdown.splitlines():
        item, further = ITEM.match(line), re.match(r" {2,3}(\S.*)", line)
        if item:
            if not inside and lines and lines[-1].strip():
                lines.append("")
            inside = True
        elif inside and further:
            line = f"    {further[1]}"
        elif inside and line.strip() and not line.startswith("    "):
            inside = False
            if lines and lines[-1].strip():
                lines.append("")
        lines.append(line)
    return "\n".join(lines)


def help_of_commands() -> Iterator[str]:
    """Yields the lines of a section for `octavo` and one for each of its commands, with their whole help as code."""
    from click.testing import CliRunner

    from octavo.cli import Octavo, main

    pages = [("octavo", ["--help"])]
    for name in [name for names in Octavo.headings.values() for name in names]:
        has_all = any("--help-all" in item.opts for item in main.commands[name].params)
        pages.append((f"octavo {name}", [name, "--help-all" if has_all else "--help"]))
    for title, words in pages:
        done = CliRunner().invoke(main, words, prog_name="octavo", terminal_width=COLUMNS)
        yield from (f"## {title}", "", *(f"    {line}".rstrip() for line in done.output.splitlines()), "")
