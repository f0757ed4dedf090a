"""Defines the commands of the command line.

A command imports torch and the rest of its code only when it runs, so that help and errors in the options appear at
once.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import click

from octavo.capture.errors import OctavoError
from octavo.capture.ranks import Ranks, ranks_of_environment

from . import __version__
from .commands.calibrate_options import NOT_FOR_CLASSIFIERS, CalibrateOptions, ClassifierOptions
from .commands.capture_options import CaptureOptions
from .commands.compare_options import CompareOptions
from .commands.early import check, check_calibration, need
from .commands.generate_options import GenerateOptions
from .declarations import Option, parameters_of
from .help_pages import Command, Grouped
from .run_options import FILES, PRINTED


def printing(heading: str = PRINTED) -> list[click.Parameter]:
    """Returns the options --json and --debug, which every command has. --help-all lists them under `heading`."""
    return [
        Option(["--json", "as_json"], is_flag=True, heading=heading, help="Print JSON, one object per line."),
        debugging(heading),
    ]


def debugging(heading: str = PRINTED) -> Option:
    """Returns the option --debug, which --help-all lists under `heading`. --debug is read before --config, so that an
    error in the config file can show a traceback."""
    return Option(["--debug"], is_flag=True, is_eager=True, heading=heading, help="Show the traceback of an error.")


def configurable(parameters: list[click.Parameter]) -> list[click.Parameter]:
    """Returns `parameters` and the option --config FILE, whose entries become the defaults of the options among
    `parameters`. FILE is a TOML file."""

    def set_defaults(context: click.Context, option: click.Parameter, path: Path | None) -> None:
        if path is None:
            return
        from .terminal import errors

        with errors(context.params.get("debug", False), ranks_of_environment()):
            from .commands.config_file import read_config

            context.default_map = read_config(path, parameters)

    config = Option(
        ["--config"], type=click.Path(path_type=Path), metavar="FILE", callback=set_defaults, is_eager=True,
        expose_value=False, heading=FILES, help="Read options from a TOML file; options on the command line win.",
    )  # fmt: skip
    return [*parameters, config]


@contextmanager
def ranked(debug: bool) -> Iterator[Ranks]:
    """Yields the ranks of this run. An error in the body of `with` ends all ranks: one of them prints the error, and
    all exit with its exit code. With `debug`, Python prints a traceback instead."""
    from .terminal import errors

    ranks = ranks_of_environment()
    with errors(debug, ranks):
        yield ranks


@contextmanager
def error_of_all(ranks: Ranks) -> Iterator[None]:
    """Handles an OctavoError that all `ranks`, the processes of a run, meet in the body of `with`, such as one for a
    wrong option. The first process of each machine raises it again; the other processes exit with its exit code and
    print nothing."""
    try:
        yield
    except OctavoError as error:
        if ranks.local:
            sys.exit(error.exit_code)
        raise


class Octavo(Grouped):
    """The `octavo` command. Prepares stdout and stderr, so that printing does not fail if a pipe is closed, a stream is
    missing or an encoding lacks characters."""

    headings: ClassVar[Mapping[str, Sequence[str]]] = {
        "Quantize": ("capture", "calibrate", "calibrate-cnn", "convert-pth"),
        "Check and draw": ("inspect", "generate", "compare"),
        "This machine": ("doctor",),
    }

    def main(self, *args: Any, **options: Any) -> Any:
        from .terminal import prepare_streams

        prepare_streams()
        return super().main(*args, **options)

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        from .terminal import parsing, pipes

        with pipes(), parsing():
            return super().make_context(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        from .terminal import pipes

        with pipes():
            return super().invoke(ctx)


# what `octavo` prints without a command; at most 78 columns
FIRST_USE = """\
Octavo turns the denoiser of a diffusion pipeline into 8-bit integers.

Try it with demo, a small pipeline that comes with Octavo (two minutes):

  octavo capture demo captured --limit 8   run it, record its denoiser's calls
  octavo calibrate captured w8a8           choose integers, write a checkpoint
  octavo inspect w8a8                      check it, see what can load it
  octavo compare demo w8a8                 draw with both: report.html

Then give the directory of your own pipeline in place of demo.

  octavo --help                            all commands
  octavo calibrate --help                  options of a command, with examples
  octavo doctor                            what this machine has"""


@click.group(
    cls=Octavo,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="octavo")
@click.pass_context
def main(context: click.Context) -> None:
    """Quantize the denoiser of a diffusion pipeline from floating point to 8-bit integers (W8A8).

    \b
    First use:
      octavo capture demo captured --limit 8
      octavo calibrate captured w8a8
      octavo inspect w8a8
    """
    if context.invoked_subcommand is None:
        from .terminal import parsing

        with parsing():
            click.echo(FIRST_USE)


@main.command(
    cls=Command,
    short_help="Run a pipeline and record the calls of its denoiser.",
    examples=[
        "octavo capture demo captured --limit 8",
        "octavo capture /models/sd3 captured --prompts prompts.txt --dtype bfloat16",
    ],
    params=[*parameters_of(CaptureOptions), *printing()],
)
def capture(debug: bool, as_json: bool, **options: Any) -> None:
    """Run MODEL (a diffusers directory or demo) on prompts; record its denoiser's calls in CAPTURE."""
    with ranked(debug) as ranks:
        with error_of_all(ranks):
            check(chosen := CaptureOptions(**options))
        from .commands.capture import run
        from .terminal import Terminal

        run(chosen, Terminal(as_json, quiet=ranks.rank > 0), ranks)


@main.command(
    cls=Command,
    short_help="Quantize a captured denoiser to 8-bit integers.",
    examples=[
        "octavo calibrate captured w8a8",
        "octavo calibrate captured w8a8 --accuracy balanced --format diffusers",
    ],
    params=[*configurable(parameters_of(CalibrateOptions)), *printing()],
)
def calibrate(debug: bool, as_json: bool, **options: Any) -> None:
    """Replay CAPTURE, quantize the denoiser to 8-bit integers, and write a checkpoint to OUT."""
    with ranked(debug) as ranks:
        with error_of_all(ranks):
            check_calibration(chosen := CalibrateOptions(**options))
        from .commands.calibrate import run
        from .terminal import Terminal

        run(chosen, Terminal(as_json, quiet=ranks.rank > 0), ranks)


@main.command(
    name="calibrate-cnn",
    cls=Command,
    short_help="Quantize an image classifier to 8-bit integers.",
    examples=["octavo calibrate-cnn /models/resnet-50 w8a8 --images pictures/"],
    params=[*configurable(parameters_of(ClassifierOptions, without=NOT_FOR_CLASSIFIERS)), *printing()],
)
def calibrate_cnn(debug: bool, as_json: bool, **options: Any) -> None:
    """Quantize MODEL, an image classifier of transformers or digits (bundled), and write a checkpoint to OUT."""
    with ranked(debug) as ranks:
        with error_of_all(ranks):
            check_calibration(chosen := ClassifierOptions(**options))
        from .commands.calibrate_classifier import run_classifier
        from .terminal import Terminal

        run_classifier(chosen, Terminal(as_json, quiet=ranks.rank > 0), ranks)


@main.command(
    cls=Command,
    short_help="Show and check a capture, a checkpoint or an ONNX graph.",
    examples=["octavo inspect w8a8", "octavo inspect captured"],
    params=printing(heading=""),
)
@click.argument("path", type=click.Path(path_type=Path))
def inspect(path: Path, as_json: bool, debug: bool) -> None:
    """Show and check PATH: a capture, a checkpoint or an ONNX graph. The exit code is 0 only if it is sound."""
    from .terminal import Terminal, errors

    with errors(debug):
        if str(path) not in ("demo", "demo-int8"):
            need(path, "directory")
        from .commands.inspect import run

        run(path, Terminal(as_json))


@main.command(
    cls=Command,
    short_help="Draw a picture or a video with a float or a quantized model.",
    examples=['octavo generate w8a8 "an otter on a skateboard" -o otter.png --seed 3'],
    params=[*parameters_of(GenerateOptions), *printing()],
)
def generate(debug: bool, as_json: bool, **options: Any) -> None:
    """Draw a picture or a video of PROMPT with MODEL: a diffusers directory, a checkpoint, demo, or demo-int8."""
    from .terminal import Terminal, errors

    with errors(debug):
        check(chosen := GenerateOptions(**options))
        from .commands.generate import run

        run(chosen, Terminal(as_json))


@main.command(
    cls=Command,
    short_help="Draw with the float and the quantized model; write a page.",
    examples=[
        "octavo compare demo w8a8 --limit 8 -o report.html",
        "octavo compare /models/sd3 fast best --seeds 2 --preset pictures",
    ],
    params=[*parameters_of(CompareOptions), *printing()],
)
def compare(debug: bool, as_json: bool, **options: Any) -> None:
    """Draw the same prompts with MODEL (float) and each OUT (quantized), and compare them on one page."""
    from .terminal import Terminal, errors

    with errors(debug):
        check(chosen := CompareOptions(**options))
        from .commands.compare import run

        run(chosen, Terminal(as_json))


@main.command(
    cls=Command,
    short_help="Show what this machine has, how fast it is, and what would be quicker.",
    examples=["octavo doctor", "octavo doctor --json"],
    params=printing(heading=""),
)
def doctor(as_json: bool, debug: bool) -> None:
    """Show what this machine has, measure its processor, and say what would make Octavo quicker here."""
    from .terminal import Terminal, errors

    with errors(debug):
        from .commands.doctor import run

        run(Terminal(as_json))


@main.command(
    name="convert-pth",
    cls=Command,
    short_help="Convert a .pth list of inputs into a capture.",
    examples=["octavo convert-pth calls.pth captured"],
    params=[debugging(heading="")],
)
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("capture", type=click.Path(path_type=Path))
def convert_pth(file: Path, capture: Path, debug: bool) -> None:
    """Convert FILE, a list of inputs that torch.save wrote, into the capture CAPTURE."""
    from .terminal import Terminal, errors

    with errors(debug):
        need(file, "file", "Give a file that torch.save wrote")
        from octavo.capture.pth.pth import convert_pth as convert

        convert(file, capture)
        from .commands.next_command import after_capture

        terminal = Terminal()
        terminal.say(f"{capture}: written.")
        after_capture(capture, terminal, "--model", "MODEL")
