"""Declares the options that all commands that run a pipeline share."""

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
PLACE = "How the model is loaded"
FILES = "Files"
PRINTED = "What is printed"
PROMPTS = (
    f"A bundled set ({', '.join(PROMPT_SETS)}), a text file with one prompt per line, or a .csv, .tsv, .json or "
    ".jsonl table."
)
DEVICES = "Device: auto, cpu, cuda or npu; cuda:1 is the second of several."
TRUST = "Run the Python files in the model directory. Read them first."
READABLE = "Let the group read the files: modes 0440, 0640 and 0750 instead of 0400, 0600 and 0700."
LORA = "Add this LoRA, times SCALE (1 if not given), to the weights; may be repeated."
OFFLOAD = "Keep only the component that is running on the device, the others in main memory."


# arguments of a pipeline's call that have an option of their own
BY_OPTION = {
    "num_inference_steps": "--steps", "height": "--height", "width": "--width", "guidance_scale": "--guidance-scale",
    "negative_prompt": "--negative-prompt", "generator": "--seed", "num_frames": "--frames", "fps": "--fps",
    "resolution": "--resolution", "aspect": "--aspect",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The options of a command that runs a pipeline: the arguments of the pipeline's call, the device and the dtype."""

    steps: int | None = option(
        "Denoising steps  [default: set by the model family]", type=click.IntRange(1), metavar="N"
    )
    height: int | None = option("Height of the picture in pixels.", type=click.IntRange(1), metavar="N")
    width: int | None = option("Width of the picture in pixels.", type=click.IntRange(1), metavar="N")
    guidance_scale: float | None = option("Strength of classifier-free guidance.", metavar="NUMBER")
    seed: int = option("Seed of the initial noise.", default=0, type=click.IntRange(0), metavar="N")
    negative_prompt: str | None = option(
        "Text that classifier-free guidance moves away from.", heading=CALL, metavar="TEXT"
    )
    frames: int | None = option("Number of frames of a video.", heading=CALL, type=click.IntRange(1), metavar="N")
    fps: int | None = option("Frames per second of a video.", heading=CALL, type=click.IntRange(1), metavar="N")
    resolution: str | None = option("Open-Sora only: 144p, 240p, 360p, 480p or 720p.", heading=CALL, metavar="NAME")
    aspect: str | None = option("Open-Sora only: ratio of height to width, as in 9:16.", heading=CALL, metavar="H:W")
    arguments: tuple[str, ...] = several(
        "Another argument of the pipeline's call. VALUE is JSON, a picture, or a file of tensors.", "--arg",
        heading=CALL, metavar="NAME=VALUE",
    )  # fmt: skip
    device: str = option(DEVICES, default="auto", metavar="NAME")
    dtype: str | None = option("Dtype of the model  [default: as stored; float32 on a CPU]", type=click.Choice(DTYPES))
    text_encoder: Path | None = option(
        "Folder of the T5 encoder, if MODEL holds only the denoiser.", heading=PLACE, metavar="DIR"
    )  # fmt: skip
    trust_remote_code: bool = flag(TRUST, heading=PLACE)

    # arguments of a pipeline's call that Octavo sets and --arg may not
    own_arguments: ClassVar[frozenset[str]] = frozenset(
        {"callback", "callback_steps", "callback_on_step_end", "callback_on_step_end_tensor_inputs"}
    )

    @property
    def settings(self) -> "RunSettings":
        """The settings of a run of the pipeline (`RunSettings`) that these options describe.

        Raises UsageError for an --arg that is not NAME=VALUE, for a NAME that is given twice or that another option
        sets (such as steps, for --steps), and for a file that does not exist. Raises FileError for a picture or file of
        tensors that cannot be read.
        """
        from octavo.pipelines.run import RunSettings

        from .argument_values import parse_argument

        named = {"num_frames": self.frames, "fps": self.fps, "resolution": self.resolution, "aspect": self.aspect}
        further = {name: value for name, value in named.items() if value is not None}
        names: set[str] = set()
        for text in self.arguments:
            self._refuse_argument(text.partition("=")[0], names)
            name, value = parse_argument(text)
            names.add(name)
            further[name] = value
        return RunSettings(
            self.negative_prompt, self.steps, self.height, self.width, self.guidance_scale, self.seed, further
        )

    def _refuse_argument(self, name: str, previous: set[str]) -> None:
        """Raises UsageError for an --arg called `name` that may not be given: one that Octavo sets itself, one that has
        an option of its own, or one that was given before (`previous`)."""
        if name in previous:
            raise UsageError(f"--arg {name}: is given twice. Give it once.")
        if name in self.own_arguments:
            raise UsageError(f"--arg {name}: Octavo sets this argument itself. Remove it.")
        prompts = "--prompts" if hasattr(self, "prompts") else "PROMPT, the argument after MODEL"
        if option := {"prompt": prompts, **BY_OPTION}.get(name):
            raise UsageError(f"--arg {name}: cannot be set with --arg. Use {option}.")
