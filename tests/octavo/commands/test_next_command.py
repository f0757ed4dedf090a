"""Checks that the last line of a command's output names a command that works next."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from octavo.cli import main
from octavo.commands.next_command import out_for

from ...helpers.commands import capture, octavo


def next_of(output: str) -> list[str]:
    """Returns the words of the command in the last line of `output`."""
    line = output.splitlines()[-1]
    assert line.startswith("Next: octavo ")
    return shlex.split(line.removeprefix("Next: octavo "))


def test_each_command_leads_to_the_next_up_to_the_comparison(tiny_model: Path, tmp_path: Path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle")
    captured = tmp_path / "my captured"
    words = next_of(capture(tiny_model, captured, prompts))
    assert words == ["calibrate", str(captured), str(tmp_path / "my w8a8")]
    assert next_of(octavo("inspect", captured)) == words
    words = next_of(octavo(*words))
    assert words == ["inspect", str(tmp_path / "my w8a8")]
    words = next_of(octavo(*words))
    assert words == ["compare", str(tiny_model.resolve()), str(tmp_path / "my w8a8")]
    parent = click.Context(main, **main.context_settings)
    main.commands["compare"].make_context("compare", words[1:], parent=parent)  # its arguments are valid
    assert all(Path(word).exists() for word in words[1:])


def test_inspect_leads_to_the_comparison_where_octavo_loads_a_format_and_to_the_runtime_elsewhere(
    tiny_model: Path, checkpoint: Callable[..., Path]
):
    for formats in ("diffusers", "torchao,diffusers"):
        out = checkpoint("--format", formats, "--accuracy", "plain")
        assert next_of(octavo("inspect", out)) == ["compare", str(tiny_model.resolve()), str(out)]
    output = octavo("inspect", checkpoint("--format", "torchao", "--accuracy", "plain"))
    assert output.splitlines()[-1].endswith("docs/formats.md shows under torchao.")


def test_programs_get_no_such_line(tiny_model: Path, tmp_path: Path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle")
    output = capture(tiny_model, tmp_path / "captured", prompts, "--json")
    assert all(isinstance(json.loads(line), dict) for line in output.splitlines() if not line.startswith("Warning"))


@pytest.mark.parametrize(("capture", "out"), [("captured", "w8a8"), ("a/sd3-captured", "a/sd3-w8a8"), ("x", "x-w8a8")])
def test_the_checkpoint_is_named_after_the_capture(capture: str, out: str):
    assert out_for(Path(capture)) == Path(out)
