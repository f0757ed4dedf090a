"""The options that every command shares that runs a pipeline."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from octavo.capture.errors import UsageError

from ..declarations import flag, option, several
from ..words import DTYPES, PROMPT_SETS

if TYPE_CHECKING:
    from octavo.pipelines.run import RunSettings

CALL = "How the pipeline is called"
PLACE = "Where and in what it runs"
FILES = "Files"
PRINTED = "What is printed"
PROMPTS = f"A set ({', '.join(PROMPT_SETS)}) or a text file with one prompt a line."
DEVICES = "Device: auto, cpu, cuda or npu, with an index if needed, as in cuda:1."
TRUST = "Run the Python files of the model directory. Read them first."
READABLE = "Let the group read the files: modes 0440, 0640 and 0750 instead of 0400, 0600 and 0700."
OFFLOAD = "Keep only the component that runs on the device."


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a pipeline is called, and where it runs."""

    steps: int | None = option(
        "Denoising steps  [default: as the model family has it]", type=click.IntRange(1), metavar="N"
    )
    height: int | None = option("Height of the picture in pixels.", type=click.IntRange(1), metavar="N")
    width: int | None = option("Width of the picture in pixels.", type=click.IntRange(1), metavar="N")
    guidance_scale: float | None = option("Strength of classifier-free guidance.", metavar="NUMBER")
    seed: int = option("Seed of the noise.", default=0, type=click.IntRange(0), metavar="N")
    negative_prompt: str | None = option(
        "Text that classifier-free guidance moves away from.", heading=CALL, metavar="TEXT"
    )
    frames: int | None = option("Frames of a video.", heading=CALL, type=click.IntRange(1), metavar="N")
    fps: int | None = option("Frames per second of a video.", heading=CALL, type=click.IntRange(1), metavar="N")
    resolution: str | None = option("Open-Sora only: 144p, 240p, 360p, 480p or 720p.", heading=CALL, metavar="NAME")
    aspect: str | None = option("Open-Sora only: height to width, as in 9:16.", heading=CALL, metavar="H:W")
    arguments: tuple[str, ...] = several(
        "Another argument of the pipeline's call. VALUE is JSON or the path of a picture.", "--arg",
        heading=CALL, metavar="NAME=VALUE",
    )  # fmt: skip
    device: str = option(DEVICES, default="auto", metavar="NAME")
    dtype: str | None = option("Dtype of the model  [default: as stored; float32 on a CPU]", type=click.Choice(DTYPES))
    text_encoder: Path | None = option(
        "Folder of the T5 encoder, where MODEL is the denoiser alone.", heading=PLACE, metavar="DIR"
    )  # fmt: skip
    trust_remote_code: bool = flag(TRUST, heading=PLACE)

    @property
    def settings(self) -> "RunSettings":
        """The settings of a run. Raises UsageError for an --arg that is not NAME=VALUE."""
        from octavo.pipelines.run import RunSettings

        named = {"num_frames": self.frames, "fps": self.fps, "resolution": self.resolution, "aspect": self.aspect}
        further = {name: value for name, value in named.items() if value is not None}
        further |= dict(_parsed(text) for text in self.arguments)
        return RunSettings(
            self.negative_prompt, self.steps, self.height, self.width, self.guidance_scale, self.seed, further
        )


def _parsed(text: str) -> tuple[str, Any]:
    """The name and the value in NAME=VALUE: JSON, the path of a picture, or else the text itself."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise UsageError(f"--arg {text}: not NAME=VALUE. Give the name of an argument of the pipeline's call.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        if Path(value).suffix.lower() in (".png", ".jpg", ".jpeg", ".webp") and Path(value).is_file():
            from PIL import Image

            return name, Image.open(value).convert("RGB")
        return name, value
