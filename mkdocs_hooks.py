"""Prepares the pages of docs/ for the site. They are written for GitHub, and Python-Markdown reads lists otherwise.

GitHub lets a list begin right after a line of text, and indents the lines of an item by two or three spaces.
Python-Markdown, which builds the site, needs a blank line before a list and an indentation of four.
"""

import re
from typing import Any

ITEM = re.compile(r"(?P<marker>[-*]|\d+\.) +(?P<text>.*)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Returns the text of a page with a blank line before each list, and four spaces before the further lines of an
    item. mkdocs calls this function for each page."""
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
