"""Checks that the fields of a dataclass become options of a command."""

from dataclasses import dataclass
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from octavo.declarations import Option, Within, argument, flag, option, parameters_of, several


@dataclass(frozen=True, kw_only=True)
class Base:
    last: int = option("The last.", default=3)


@dataclass(frozen=True, kw_only=True)
class Options(Base):
    path: Path = argument(metavar="WHERE")
    some_words: tuple[str, ...] = several("Words.", "--word")
    out: Path = option("Required.", "-o", required=True)
    replace: bool = flag("Replace.", heading="Files")
    smooth: bool | None = option("Both ways.", "--smooth/--no-smooth")
    share: float = option("Between.", default=1.0, type=Within(0, 2))
    undeclared: int = 7


def run(*arguments: str) -> Options | str:
    options = []
    command = click.Command(
        "run", params=parameters_of(Options), callback=lambda **values: options.append(Options(**values))
    )
    done = CliRunner().invoke(command, list(arguments))
    return options[0] if options else done.output


def test_fields_become_parameters_of_their_names_types_and_defaults():
    assert run("a", "-o", "b") == Options(path=Path("a"), out=Path("b"))
    more = ("--word", "x", "--word", "y", "--replace", "--no-smooth", "--share", "2", "--last", "4")
    assert run("a", "-o", "b", *more) == Options(
        path=Path("a"), out=Path("b"), some_words=("x", "y"), replace=True, smooth=False, share=2.0, last=4
    )
    assert "Missing option '-o'" in run("a")
    assert "Missing argument 'WHERE'" in run("-o", "b")


def test_a_class_comes_before_its_bases_and_what_is_left_out_keeps_its_default():
    names = [parameter.name for parameter in parameters_of(Options, without=("share",))]
    assert names == ["path", "some_words", "out", "replace", "smooth", "last"]


def test_headings_and_shown_defaults():
    options = {item.name: item for item in parameters_of(Options) if isinstance(item, Option)}
    assert {name for name, item in options.items() if item.heading} == {"replace"}
    assert {name for name, item in options.items() if item.show_default} == {"share", "last"}


@pytest.mark.parametrize("text", ["-0.1", "2.1", "nan", "inf"])
def test_a_number_that_is_not_between_the_limits(text):
    assert f"Invalid value for '--share': {text} is outside 0 to 2." in run("a", "-o", "b", "--share", text)
