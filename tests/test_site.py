"""Checks that pages written for GitHub are read alike by Python-Markdown, which builds the site."""

import re
from pathlib import Path

import click
import pytest

import mkdocs_hooks
from octavo.cli import main

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def test_a_list_after_a_line_of_text_gets_a_blank_line_and_its_further_lines_four_spaces():
    page = "Three things:\n- one\n  goes on\n- two\nText again.\n\n    - code\n"
    wanted = "Three things:\n\n- one\n    goes on\n- two\n\nText again.\n\n    - code"
    assert mkdocs_hooks.with_spaced_lists(page) == wanted


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_word_of_a_page_is_lost(path):
    text = path.read_text()
    assert mkdocs_hooks.with_spaced_lists(text).split() == text.split()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_site_has_the_page_in_its_menu(path):
    menu = re.findall(r"- ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert menu.count(str(path.relative_to(ROOT / "docs"))) == 1


def test_the_page_of_commands_has_the_help_of_each_command():
    page = mkdocs_hooks.on_page_markdown((ROOT / "docs" / "reference" / "commands.md").read_text())
    assert mkdocs_hooks.HELP not in page
    for name, command in main.commands.items():
        section = page.partition(f"## octavo {name}\n")[2].partition("\n## ")[0]
        names = {word for item in command.params if isinstance(item, click.Option) for word in item.opts}
        assert all(word in section for word in names)
