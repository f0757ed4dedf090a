"""Checks that --help fits a screen, that --help-all lists every option, and that help imports no torch."""

import re
import shlex
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from octavo.cli import Octavo, main
from octavo.declarations import Option
from octavo.help_pages import Command

COMMANDS = dict(main.commands)
LONG = [name for name, command in COMMANDS.items() if any(getattr(item, "heading", "") for item in command.params)]


def shown(*arguments: str, columns: int = 100) -> list[str]:
    # click leaves two columns of the screen empty
    done = CliRunner().invoke(main, list(arguments), terminal_width=columns - 2)
    assert done.exit_code == 0, done.output
    return done.output.splitlines()


def options_in(lines: list[str]) -> list[str]:
    """Returns the first long name, or else the only name, of each option that stands at the start of a line."""
    starts = [re.match(r"  (?:-\w, )?(--?[\w-]+)", line) for line in lines]
    return [start[1] for start in starts if start]


def names_of(command: click.Command, first: bool) -> list[str]:
    """Returns the names that a help page has to list: all options that are not hidden, or with `first` those without a
    heading."""
    options = [item for item in command.params if isinstance(item, click.Option) and not item.hidden]
    listed = [item for item in options if not (first and isinstance(item, Option) and item.heading)]
    return [max(item.opts, key=len) for item in listed] + ["--help"]


@pytest.mark.parametrize("arguments", [(), *((name,) for name in COMMANDS)], ids=" ".join)
def test_the_short_help_fits_a_screen(arguments):
    lines = shown(*arguments, "--help")
    assert len(lines) <= 30
    assert shown(*arguments, "-h") == lines


@pytest.mark.parametrize("name", COMMANDS)
def test_the_short_help_has_the_options_without_a_heading(name):
    assert sorted(options_in(shown(name, "--help"))) == sorted(names_of(COMMANDS[name], first=True))


def test_commands_of_many_options_have_a_full_help():
    assert {"capture", "calibrate", "calibrate-cnn", "compare", "generate"} == set(LONG)
    assert all("--help-all" in options_in(shown(name, "--help")) for name in LONG)


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize("name", LONG)
def test_the_full_help_has_every_option_once(name, columns):
    lines = shown(name, "--help-all", columns=columns)
    assert max(map(len, lines)) <= columns
    listed = options_in(lines)
    assert sorted(listed) == sorted(names_of(COMMANDS[name], first=False))
    assert f"Show all {len(listed)} options." in " ".join(lines)
    headings = {item.heading for item in COMMANDS[name].params if isinstance(item, Option)} - {""}
    assert all(f"{heading}:" in lines for heading in headings)


def test_the_full_help_needs_no_arguments_and_wins_over_what_is_wrong():
    assert shown("calibrate", "--help-all", "--format", "nope") == shown("calibrate", "--help-all")


def test_every_option_says_what_it_does():
    for command in COMMANDS.values():
        for item in command.params:
            if isinstance(item, click.Option):
                assert re.match(r"[A-Z].*[.\])]$", item.help or ""), item.opts
                assert not re.match(r"(Of|That|Those|What|Its|The same)\b", item.help or ""), item.opts


def test_help_imports_no_torch():
    pages = [[], *([name] for name in COMMANDS)]
    code = (
        "import sys; from click.testing import CliRunner; from octavo.cli import main\n"
        f"for words in {[[*page, '--help'] for page in pages] + [[name, '--help-all'] for name in LONG]}:\n"
        "    assert CliRunner().invoke(main, words).exit_code == 0, words\n"
        "print(sorted({'torch', 'numpy', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_octavo_alone_shows_commands_of_a_first_use_that_exist():
    lines = shown()
    assert max(map(len, lines)) <= 78
    words = [line.split() for line in lines if line.startswith("  octavo ")]
    named = [name for _, name, *_ in words if not name.startswith("-")]
    assert named == ["capture", "calibrate", "inspect", "compare", "calibrate", "doctor"]
    assert set(named) <= set(COMMANDS)


def test_the_help_of_octavo_has_each_command_once_under_a_heading():
    assert sorted(name for names in Octavo.headings.values() for name in names) == sorted(COMMANDS)
    lines = shown("--help")
    assert all(f"{heading}:" in lines for heading in Octavo.headings)
    assert [line.split()[0] for line in lines if line.split() and line.split()[0] in COMMANDS] == main.list_commands(
        click.Context(main)
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_a_command_can_be_parsed(name):
    command = COMMANDS[name]
    assert isinstance(command, Command)
    assert command.examples
    for example in command.examples:
        program, first, *words = shlex.split(example)
        assert (program, first) == ("octavo", name)
        command.make_context(name, words, parent=click.Context(main, **main.context_settings))
        assert f"  {example}" in shown(name, "--help")
