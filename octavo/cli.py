"""Defines the commands of the command line.

A command imports torch and the rest of its code only when it runs, so that help and errors in the options appear at
once.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
from .help_pages import Command
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
    """Yields the ranks of this run. An error in the body of `with` ends all ranks: one prints the error, and all exit
    with its exit code. With `debug`, Python prints a traceback instead."""
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


class Octavo(click.Group):
    """The `octavo` command. Prepares stdout and stderr, so that printing does not fail if a pipe is closed, a stream is
    missing or an encoding lacks characters."""

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


@click.group(cls=Octavo, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="octavo")
def main() -> None:
    """Quantize the denoiser of a diffusion pipeline from floating point to 8-bit integers (W8A8).

    \b
    octavo capture demo captured     run the pipeline over prompts and record the calls of its transformer
    octavo calibrate captured w8a8   replay these calls, quantize the transformer, write a checkpoint
    octavo inspect w8a8              show and check a capture or a checkpoint, and say which libraries load it
    octavo generate w8a8 "a red ring" -o ring.png      draw a picture with the float or the quantized model
    octavo compare demo w8a8         draw with both models; write one page of pictures and numbers
    """


@main.command(
    cls=Command,
    short_help="Run a pipeline and record the calls of its denoiser.",
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
    cls=Command, short_help="Show and check a capture, a checkpoint or an ONNX graph.", params=printing(heading="")
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
    params=[*parameters_of(CompareOptions), *printing()],
)
def compare(debug: bool, as_json: bool, **options: Any) -> None:
    """Draw the same prompts with MODEL (float) and OUT (quantized), and compare them on one page."""
    from .terminal import Terminal, errors

    with errors(debug):
        check(chosen := CompareOptions(**options))
        from .commands.compare import run

        run(chosen, Terminal(as_json))


@main.command(
    cls=Command,
    short_help="Show what the processor can do, and which kernels were chosen.",
    params=printing(heading=""),
)
def doctor(as_json: bool, debug: bool) -> None:
    """Measure this machine's processor; show the rates, and the kernels that models in integers run with."""
    from .terminal import Terminal, errors

    with errors(debug):
        from .commands.doctor import run

        run(Terminal(as_json))


@main.command(
    name="convert-pth",
    cls=Command,
    short_help="Convert a .pth list of inputs into a capture.",
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
        Terminal().say(f"{capture}: written.")
