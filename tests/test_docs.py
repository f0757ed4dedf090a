"""Checks README.md and docs/: links resolve, options exist, and the glossary is sorted and linked. What the Makefile
imports exists too."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import click
import pytest

from octavo.cli import main

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
TEXTS = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")] + PAGES
COMMANDS = dict(main.commands)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CELL = re.compile(r"(?<!\\)\|")  # separates the cells of a table; \| is a bar inside a cell
OPTION = re.compile(r"(?<![\w-])--?[a-z][\w-]*")


def prose(path: Path) -> str:
    """Returns the text of a page without its indented code blocks."""
    return "\n".join(line for line in path.read_text().splitlines() if not line.startswith("    "))


def anchors(path: Path) -> set[str]:
    """Returns the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def tables(path: Path) -> Iterator[list[list[str]]]:
    """Yields each table of a page as rows of cells, the header first."""
    for block in re.findall(r"(?:^\|.*\n)+", path.read_text(), re.MULTILINE):
        rows = [[cell.strip() for cell in CELL.split(line)[1:-1]] for line in block.splitlines()]
        yield [rows[0], *rows[2:]]


def documented() -> dict[str, list[str]]:
    """Returns the options of each command in the tables of docs/cli.md, whose headers name the commands."""
    options: dict[str, list[str]] = {name: [] for name in COMMANDS}
    for header, *rows in tables(ROOT / "docs" / "cli.md"):
        if header[0].startswith("option of"):
            for command in re.findall(r"`([\w-]+)`", header[0]):
                options[command] += [option for row in rows for option in options_in(row[0])]
    return options


def options_in(cell: str) -> list[str]:
    """Returns the options in the backquoted parts of a cell."""
    return [option for code in re.findall(r"`[^`]*`", cell) for option in OPTION.findall(code)]


def options_of(command: click.Command) -> list[str]:
    """Returns the options of a command that are not hidden, with short forms and negations."""
    context = click.Context(command, help_option_names=["-h", "--help"])
    options = [item for item in command.get_params(context) if isinstance(item, click.Option) and not item.hidden]
    return [name for option in options for name in [*option.opts, *option.secondary_opts]]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_and_anchors_resolve(path):
    for link in LINK.findall(prose(path)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_has_at_most_150_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_page_starts_with_what_the_reader_wants(path):
    title, blank, first = path.read_text().splitlines()[:3]
    assert title.startswith("# ")
    assert not blank
    assert first.startswith("Read this page when ")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_tables_of_options_list_each_option_of_a_command_once(name):
    assert sorted(documented()[name]) == sorted(options_of(COMMANDS[name]))


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_a_text_have_these_options(path):
    text = path.read_text().replace("\\\n", " ")
    blocks = [line for line in text.splitlines() if line.startswith("    ")]
    snippets = [*blocks, *re.findall(r"`[^`]*`", prose(path))]
    for snippet, command in ((snippet, re.search(r"\boctavo +([a-z-]+) (.*)", snippet)) for snippet in snippets):
        if command and command[1] in COMMANDS:
            assert set(OPTION.findall(command[2])) <= set(options_of(COMMANDS[command[1]])), snippet


def test_the_glossary_is_sorted_and_each_entry_is_linked():
    glossary = ROOT / "docs" / "glossary.md"
    entries = re.findall(r"^## (.*)$", glossary.read_text(), re.MULTILINE)
    assert entries == sorted(entries, key=str.lower)
    links = {link for path in TEXTS for link in LINK.findall(prose(path))}
    linked = {link.partition("#")[2] for link in links if "glossary.md#" in link}
    assert anchors(glossary) - {"glossary"} == linked


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_a_text_names_exist(path):
    for name in re.findall(r"`((?:bench|calibrate|capture|docs|octavo|pipelines|prompts|tests)/[\w./]+)`", prose(path)):
        assert (ROOT / name).exists(), name
    for module in re.findall(r"python -m (bench\.\w+)", path.read_text()):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module


def test_names_that_the_makefile_imports_exist():
    imports = re.findall(r"from (octavo[\w.]+) import (\w+)", (ROOT / "Makefile").read_text())
    assert imports
    assert all(hasattr(importlib.import_module(module), name) for module, name in imports)


def test_messages_in_troubleshooting_stand_in_the_code():
    folders = ("octavo/commands", "octavo", "capture", "calibrate", "pipelines", "prompts")
    code = "\n".join(path.read_text() for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # a message may continue in the next line
    messages = [
        message
        for header, *rows in tables(ROOT / "docs" / "troubleshooting.md")
        for row in rows
        if header[0] == "message has"
        for message in re.findall(r"`([^`]*)`", row[0])
    ]
    assert len(messages) > 20
    assert [message for message in messages if message not in code] == []


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "pictures").glob("*.svg")), ids=lambda path: path.name)
def test_a_picture_is_well_formed_and_loads_nothing(path):
    root = ElementTree.parse(path).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    text = path.read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|@import|<script|<image|href=", text)
    if path.name not in ("favicon.svg", "demo.svg"):  # the first is an icon, the second is dark in any case
        assert root.find("{http://www.w3.org/2000/svg}desc") is not None
        assert "prefers-color-scheme: dark" in text
