"""Runs Octavo's commands in this process."""

from pathlib import Path

from click.testing import CliRunner

from octavo.cli import main


def octavo(*arguments: object, code: int = 0) -> str:
    """Runs a command, checks its exit code, and returns what it printed to stdout and stderr."""
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    return done.output


def capture(model: Path, out: Path, prompts: Path, *more: object, code: int = 0) -> str:
    """Runs `octavo capture` in three steps of 16 x 16 pixels."""
    small = ("--height", 16, "--width", 16, "--device", "cpu")
    return octavo("capture", model, out, "--prompts", prompts, "--steps", 3, *small, *more, code=code)


def errors(output: str) -> list[str]:
    """Returns the error lines of a command's output."""
    return [line for line in output.splitlines() if line.startswith("Error")]
