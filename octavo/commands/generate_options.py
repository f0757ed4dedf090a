"""The options of `octavo generate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ..declarations import argument, flag, option
from ..run_options import OFFLOAD, PLACE, RunOptions


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(RunOptions):
    """The model, the prompt, and the file to write."""

    model: str = argument()
    prompt: str = argument()
    out: Path = option(
        "A picture (.png, .jpg, .webp), a video (.mp4), a directory of pictures or frames, or latents (.safetensors).",
        "-o", required=True, metavar="FILE",
    )  # fmt: skip
    overwrite: bool = flag("Replace what is there.")
    of: str | None = option(
        "The float pipeline, where MODEL is a checkpoint  [default: the pipeline that was calibrated]", "--model",
        heading=PLACE, metavar="DIR",
    )  # fmt: skip
    component: str | None = option("The denoiser that the checkpoint replaces.", heading=PLACE, metavar="NAME")
    offload: bool = flag(OFFLOAD, heading=PLACE)
    own_arguments: ClassVar[frozenset[str]] = RunOptions.own_arguments | {"output_type"}
