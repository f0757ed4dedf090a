"""The options that every command shares that runs a pipeline."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import click

from octavo.capture.errors import UsageError

from .declarations import flag, option, several
from .words import DTYPES, PROMPT_SETS

if TYPE_CHECKING:
    from octavo.pipelines.run import RunSettings

CALL = "How the pipeline is called"
PLACE = "Where and in what it runs"
FILES = "Files"
PRINTED = "What is printed"
PROMPTS = f"A set ({', '.join(PROMPT_SETS)}), a text file of one prompt a line, or a .csv, .tsv, .json or .jsonl table."
DEVICES = "Device: auto, cpu, cuda or npu, with an index if needed, as in cuda:1."
TRUST = "Run the Python files of the model directory. Read them first."
READABLE = "Let the group read the files: modes 0440, 0640 and 0750 instead of 0400, 0600 and 0700."
OFFLOAD = "Keep only the component that runs on the device."


# arguments of a pipeline's call that have an option
BY_OPTION = {
    "num_inference_steps": "--steps", "height": "--height", "width": "--width", "guidance_scale": "--guidance-scale",
    "negative_prompt": "--negative-prompt", "generator": "--seed", "num_frames": "--frames", "fps": "--fps",
    "resolution": "--resolution", "aspect": "--aspect",
}  # fmt: skip


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
        "Another argument of the pipeline's call. VALUE is JSON, a picture, or a file of tensors.", "--arg",
        heading=CALL, metavar="NAME=VALUE",
    )  # fmt: skip
    device: str = option(DEVICES, default="auto", metavar="NAME")
    dtype: str | None = option("Dtype of the model  [default: as stored; float32 on a CPU]", type=click.Choice(DTYPES))
    text_encoder: Path | None = option(
        "Folder of the T5 encoder, where MODEL is the denoiser alone.", heading=PLACE, metavar="DIR"
    )  # fmt: skip
    trust_remote_code: bool = flag(TRUST, heading=PLACE)

    # arguments of the call that Octavo sets itself
    own_arguments: ClassVar[frozenset[str]] = frozenset(
        {"callback", "callback_steps", "callback_on_step_end", "callback_on_step_end_tensor_inputs"}
    )

    @property
    def settings(self) -> "RunSettings":
        """The settings of a run.

        Raises UsageError for an --arg that is not NAME=VALUE, is given twice or has an option of its own, and for a
        file that is not there; FileError for a picture or file of tensors that cannot be read.
        """
        from octavo.pipelines.run import RunSettings

        from .argument_values import parsed

        named = {"num_frames": self.frames, "fps": self.fps, "resolution": self.resolution, "aspect": self.aspect}
        further = {name: value for name, value in named.items() if value is not None}
        given: set[str] = set()
        for text in self.arguments:
            self._refuse_ours(text.partition("=")[0], given)
            name, value = parsed(text)
            given.add(name)
            further[name] = value
        return RunSettings(
            self.negative_prompt, self.steps, self.height, self.width, self.guidance_scale, self.seed, further
        )

    def _refuse_ours(self, name: str, given: set[str]) -> None:
        if name in given:
            raise UsageError(f"--arg {name}: is given twice. Give it once.")
        if name in self.own_arguments:
            raise UsageError(f"--arg {name}: Octavo sets it itself. Leave it out.")
        prompts = "--prompts" if hasattr(self, "prompts") else "PROMPT, the argument after MODEL"
        if option := {"prompt": prompts, **BY_OPTION}.get(name):
            raise UsageError(f"--arg {name}: has an option of its own. Use {option}.")
