"""The commands. What they do is in the *_command modules, imported when one runs."""

from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import click

from octavo.capture.ranks import ranks_of_environment

from . import __version__, words

PROMPTS = f"A set ({', '.join(words.PROMPT_SETS)}) or a text file, one a line."
DEVICES = "auto, cpu, cuda or npu, with an index where wanted (cuda:1)."
debug = click.option("--debug", is_flag=True, help="Show the traceback of an error.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, one object a line.")
device = click.option("--device", default="auto", show_default=True, help=DEVICES)
dtype = click.option("--dtype", type=click.Choice(words.DTYPES), help="Default: as stored; float32 on a CPU.")
deployed = click.option("--dtype", type=click.Choice(words.DTYPES), help="Of the deployment [default: as captured].")
group_readable = click.option(
    "--group-readable", is_flag=True, help="Modes 0440, 0640, 0750 instead of 0400, 0600, 0700."
)
trust = click.option(
    "--trust-remote-code", is_flag=True, help="Run Python files of the model directory. Read them first."
)
_RUNNING = (
    click.option("--negative-prompt", help="What guidance moves away from."),
    click.option("--steps", type=click.IntRange(1), help="Denoising steps [default: the family's; 28 for SD3]."),
    click.option("--height", type=click.IntRange(1), help="Pixels."),
    click.option("--width", type=click.IntRange(1), help="Pixels."),
    click.option("--guidance-scale", type=float, help="Strength of classifier-free guidance."),
    click.option("--seed", type=click.IntRange(0), default=0, show_default=True),
    click.option("--frames", type=click.IntRange(1), help="Of a video."),
    click.option("--fps", type=click.IntRange(1), help="Frames a second of a video."),
    click.option("--resolution", help="Open-Sora: 144p, 240p, 360p, 480p or 720p."),
    click.option("--aspect", help="Open-Sora: height to width, as in 9:16."),
    click.option(
        "--arg", "arguments", multiple=True, metavar="NAME=VALUE",
        help="More of the pipeline's call: JSON, or an image file.",
    ),
    click.option(
        "--text-encoder", type=click.Path(path_type=Path),
        help="Folder of the T5 encoder, where MODEL is the denoiser alone.",
    ),
    device,
    dtype,
    trust,
)  # fmt: skip


def runs(command: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command the options of `run_options.RunOptions`."""
    return reduce(lambda made, option: option(made), reversed(_RUNNING), command)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="octavo")
def main() -> None:
    """Take a diffusion pipeline from floating point to 8-bit integers (W8A8).

    \b
    octavo capture demo captured     run the pipeline over prompts, record what its transformer is called with
    octavo calibrate captured w8a8   replay the calls, choose the integers, write a checkpoint that deploys
    octavo inspect w8a8              what is in a capture or a checkpoint, whether it is sound, who can load it
    octavo generate w8a8 "a red ring" -o ring.png      draw with either model
    octavo compare demo w8a8         draw with float and with integers: pictures and numbers on one page
    """


@main.command()
@click.argument("model")
@click.argument("capture", type=click.Path(path_type=Path))
@click.option("--prompts", default="", help=PROMPTS)
@click.option("--limit", type=click.IntRange(1), help="Take the first prompts only.")
@runs
@click.option(
    "--pipeline", type=click.Choice(words.FAMILIES), help="The family of MODEL [default: what its files say]."
)
@click.option("--offload", is_flag=True, help="Keep on the device only the component that runs.")
@click.option("--keep", default="all", show_default=True, help="Denoising steps to store: all, every:N or spread:K.")
@click.option("--component", "components", multiple=True, help="Record this module only [default: every denoiser].")
@click.option("--drop-input", "dropped", multiple=True, help="Leave this argument out of the stored calls.")
@click.option(
    "--nonfinite",
    type=click.Choice(["error", "skip"]),
    default="error",
    show_default=True,
    help="What to do with NaN or Inf in a call.",
)
@click.option("--resume", is_flag=True, help="Go on with an interrupted capture.")
@click.option("--keep-removed", is_flag=True, help="With --resume: keep prompts that are no longer in the file.")
@click.option("--keep-going", is_flag=True, help="Go on after a prompt that fails; exit 1 at the end.")
@click.option("--strict", is_flag=True, help="Refuse weights that the model does not know.")
@click.option(
    "--pth", type=click.Path(path_type=Path), help="Also write the documented torch.save list of keyword arguments."
)
@group_readable
@as_json
@debug
def capture(debug: bool, as_json: bool, **options: Any) -> None:
    """Run MODEL (a diffusers directory, or demo) over prompts and record its denoiser's calls in CAPTURE."""
    from .terminal import Terminal, errors

    ranks = ranks_of_environment()
    with errors(debug, ranks):
        from .commands.capture import run
        from .commands.capture_job import CaptureOptions

        run(CaptureOptions(**options), Terminal(as_json, quiet=ranks.rank > 0), ranks)


@main.command()
@click.argument("capture", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--pipeline", type=click.Choice(["cnn"]), help="CAPTURE is the model: an image classifier, or digits.")
@click.option("--images", type=click.Path(path_type=Path), help="cnn: a directory of pictures to calibrate with.")
@click.option("--input-shape", metavar="1,3,224,224", help="cnn, without pictures: of an input.")
@click.option("--model", help="Another directory of the captured model [default: the one captured].")
@click.option("--component", help="The denoiser to quantize, where several were captured.")
@click.option(
    "--accuracy",
    type=click.Choice(words.RECIPES),
    default="fast",
    show_default=True,
    help="A recipe; the options below change parts of it.",
)
@click.option(
    "--observer",
    type=click.Choice(words.OBSERVERS),
    help="How the range of an activation is found.",
)
@click.option(
    "--activations",
    type=click.Choice(words.ACTIVATIONS),
    help="One range, one for each bin of noise levels, or one for each token as it comes.",
)
@click.option("--smoothing/--no-smoothing", default=None, help="Move outliers of activations into the weights.")
@click.option(
    "--weights",
    multiple=True,
    type=click.Choice(words.WEIGHT_METHODS),
    help="How weights are rounded; of several, each layer takes the best.",
)
@click.option("--bias-correction/--no-bias-correction", default=None, help="Correct the mean error of each output.")
@click.option(
    "--sigma", type=float, default=25.0, show_default=True, help="Of the sigma observer: mean +- this many deviations."
)
@click.option("--symmetric", is_flag=True, help="Activations without a zero point.")
@click.option("--weight-only", is_flag=True, help="Quantize weights, leave activations float.")
@click.option(
    "--keep-float",
    multiple=True,
    metavar="PATTERN",
    help="Leave layers of this name float, as in 'proj_out' or '*.ff.*'.",
)
@click.option(
    "--quantize", "quantize_too", multiple=True, metavar="PATTERN", help="Quantize layers that stay float by default."
)
@click.option(
    "--budget",
    metavar="LIMIT",
    help="A scheme for each layer, by final latents: 5MiB or 40% of the layers' bytes, 0.7x of their time, or both.",
)
@click.option("--samples", type=click.IntRange(1), help="Replay this many calls, those that differ most.")
@click.option("--memory", metavar="16GiB", help="Calibrate block by block in at most so much resident memory.")
@click.option(
    "--format", "formats", default="ascend", show_default=True,
    help=f"What to write: {', '.join(words.FORMATS)}, or several with commas.",
)  # fmt: skip
@click.option(
    "--max-shard-size", metavar="5GB", default="10GB", show_default=True,
    help="Of one weight file of diffusers and torchao; more weights become several.",
)  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace OUT.")
@click.option("--allow-incomplete", is_flag=True, help="Use a capture that is not finished.")
@click.option("--allow-revision", is_flag=True, help="Accept other weights of the same model class and shapes.")
@click.option("--config", type=click.Path(path_type=Path), help="A TOML file with these options by name.")
@device
@deployed
@group_readable
@trust
@as_json
@debug
@click.pass_context
def calibrate(context: click.Context, debug: bool, as_json: bool, **options: Any) -> None:
    """Replay CAPTURE through its model, choose the integers with little loss, and write a checkpoint to OUT.

    With --pipeline cnn: calibrate the image classifier MODEL in the place of CAPTURE with --images, or without data.
    """
    from .terminal import Terminal, errors

    ranks = ranks_of_environment()
    with errors(debug, ranks):
        from .commands.calibrate import run
        from .commands.calibrate_options import CalibrateOptions

        given = {n for n in options if context.get_parameter_source(n) is click.core.ParameterSource.COMMANDLINE}
        run(CalibrateOptions(**options), given, Terminal(as_json, quiet=ranks.rank > 0), ranks)


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
@as_json
@debug
def inspect(path: Path, as_json: bool, debug: bool) -> None:
    """Show what is in PATH, a capture, a checkpoint or an ONNX graph, and check it; exit 0 only if it is sound."""
    from .terminal import Terminal, errors

    with errors(debug):
        from .commands.inspect import run

        run(path, Terminal(as_json))


@main.command()
@click.argument("model")
@click.argument("prompt")
@click.option(
    "-o",
    "out",
    required=True,
    type=click.Path(path_type=Path),
    help="A picture (.png, .jpg, .webp), a video (.mp4), a directory of frames, or latents (.safetensors).",
)
@click.option(
    "--model", "of", help="The float pipeline, where MODEL is a checkpoint [default: the one it was made of]."
)
@click.option("--component", help="The denoiser of the pipeline that the checkpoint is of.")
@runs
@click.option("--offload", is_flag=True, help="Keep on the device only the component that runs.")
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@as_json
@debug
def generate(debug: bool, as_json: bool, **options: Any) -> None:
    """Make a picture or a video of PROMPT with MODEL: a diffusers directory, a checkpoint, demo, or demo-int8."""
    from .terminal import Terminal, errors

    with errors(debug):
        from .commands.generate import GenerateOptions, run

        run(GenerateOptions(**options), Terminal(as_json))


@main.command()
@click.argument("model")
@click.argument("checkpoint", type=click.Path(path_type=Path), metavar="OUT")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default="report.html", show_default=True, help="The page."
)
@click.option("--prompts", default="", help=PROMPTS)
@click.option("--limit", type=click.IntRange(1), default=8, show_default=True, help="Take the first prompts only.")
@runs
@click.option("--component", help="The denoiser that OUT is of [default: the one that fits].")
@click.option("--min-psnr", type=float, metavar="DB", help="Exit 1 when the pictures are further apart.")
@click.option("--min-sqnr", type=float, metavar="DB", help="Exit 1 when the denoiser's output is less exact.")
@click.option("--overwrite", is_flag=True, help="Replace the page that is there.")
@group_readable
@as_json
@debug
def compare(debug: bool, as_json: bool, **options: Any) -> None:
    """Draw the same prompts and noise with MODEL (float) and with OUT (its integers), and write one page about it."""
    from .terminal import Terminal, errors

    with errors(debug):
        from .commands.compare import CompareOptions, run

        run(CompareOptions(**options), Terminal(as_json))


@main.command(name="convert-pth")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("capture", type=click.Path(path_type=Path))
@debug
def convert_pth(file: Path, capture: Path, debug: bool) -> None:
    """Turn FILE, a torch.save list of inputs, into the store CAPTURE."""
    from .terminal import Terminal, errors

    with errors(debug):
        from octavo.capture.pth.pth import convert_pth as convert

        convert(file, capture)
        Terminal().say(f"{capture}: written.")
