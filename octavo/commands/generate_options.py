"""Declares the options of `octavo generate`."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ..declarations import argument, flag, option, several
from ..run_options import LORA, OFFLOAD, PLACE, RunOptions


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(RunOptions):
    """Declares the options of `octavo generate`: the model, the prompt, and the file to write."""

    model: str = argument()
    prompt: str = argument()
    out: Path = option(
        "Write a picture (.png, .jpg, .webp), a video (.mp4), a directory of pictures or frames, or latents "
        "(.safetensors).",
        "-o", required=True, metavar="FILE",
    )  # fmt: skip
    overwrite: bool = flag("Replace FILE if it exists.")
    of: str | None = option(
        "Float pipeline of the checkpoint MODEL  [default: the pipeline that was calibrated]", "--model",
        heading=PLACE, metavar="DIR",
    )  # fmt: skip
    component: str | None = option("Denoiser that the checkpoint MODEL replaces.", heading=PLACE, metavar="NAME")
    loras: tuple[str, ...] = several(LORA, "--lora", heading=PLACE, metavar="FILE[:SCALE]")
    offload: bool = flag(OFFLOAD, heading=PLACE)
    own_arguments: ClassVar[frozenset[str]] = RunOptions.own_arguments | {"output_type"}
