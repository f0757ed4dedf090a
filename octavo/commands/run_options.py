"""The options of every command that runs a pipeline: what that is asked for, and where."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.capture.errors import UsageError
from octavo.pipelines.run import RunSettings


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """By their names; `cli.runs` has them for the command line."""

    negative_prompt: str | None = None
    steps: int | None = None
    height: int | None = None
    width: int | None = None
    guidance_scale: float | None = None
    seed: int = 0
    frames: int | None = None
    fps: int | None = None
    resolution: str | None = None
    aspect: str | None = None
    arguments: tuple[str, ...] = ()
    text_encoder: Path | None = None
    device: str = "auto"
    dtype: str | None = None
    trust_remote_code: bool = False

    @property
    def settings(self) -> RunSettings:
        """What the pipeline is asked for. Raises UsageError for an --arg that is not NAME=VALUE."""
        named = {"num_frames": self.frames, "fps": self.fps, "resolution": self.resolution, "aspect": self.aspect}
        further = {name: value for name, value in named.items() if value is not None}
        further |= dict(_parsed(text) for text in self.arguments)
        return RunSettings(
            self.negative_prompt, self.steps, self.height, self.width, self.guidance_scale, self.seed, further
        )


def _parsed(text: str) -> tuple[str, Any]:
    """NAME=VALUE of --arg: JSON, the path of a picture, or else the text itself."""
    name, found, value = text.partition("=")
    if not found or not name.isidentifier():
        raise UsageError(f"--arg {text}: not NAME=VALUE. Give the name of an argument of the pipeline's call.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        if Path(value).suffix.lower() in (".png", ".jpg", ".jpeg", ".webp") and Path(value).is_file():
            from PIL import Image

            return name, Image.open(value).convert("RGB")
        return name, value
