"""Writes the output of a pipeline: pictures, videos, or latents."""

import importlib.util
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from octavo.capture.errors import StorageError, UsageError
from octavo.capture.files import (
    create,
    make_directory,
    replace_directory,
    replace_file,
    staging,
    storage,
    write_bytes,
)

_MODE, _DIRECTORY_MODE = 0o644, 0o755  # permissions of written files and directories
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # Pillow's format for each ending
_VIDEO, _LATENTS = ".mp4", ".safetensors"


class Target(NamedTuple):
    """The file or directory to write, `path`. The ending of the path says whether it is a picture, a video or latents;
    a path without an ending is a directory of pictures or of the frames of a video."""

    path: Path

    @property
    def latents(self) -> bool:
        """Whether the target is a file of latents. If so, the pipeline must return the latents without decoding
        them."""
        return self.path.suffix.lower() == _LATENTS


def target_of(path: Path, overwrite: bool) -> Target:
    """Returns the Target at `path`, and checks that it can be written, so that mistakes show before a model is loaded.

    Raises UsageError for an unknown ending, and for a video if the packages that write it are missing. Raises
    StorageError if `path` exists without `overwrite`, if it is a directory that holds anything but pictures named
    0000.png and so on and folders of such pictures, or if its parent directory does not exist.
    """
    ending = path.suffix.lower()
    if ending and ending not in (*_FORMATS, _VIDEO, _LATENTS):
        choices = ", ".join((*_FORMATS, _VIDEO, _LATENTS))
        raise UsageError(
            f"{path}: the ending '{ending}' is unknown. Use one of {choices}, or no ending for a directory of pictures."
        )
    if ending == _VIDEO and not all(importlib.util.find_spec(name) for name in ("imageio", "imageio_ffmpeg")):
        fact = "the packages that write a video are missing"
        remedy = "Install imageio and imageio-ffmpeg, or give a directory for the frames"
        raise UsageError(f"{path}: {fact}. {remedy}.")
    with storage(path):
        if path.is_dir() and (ending or any(path.iterdir())) and not (overwrite and _frames_only(path)):
            raise StorageError(f"{path}: is a directory that is not empty. Choose another name with -o.")
        if path.exists() and not path.is_dir() and not overwrite:
            raise StorageError(f"{path}: already exists. Use --overwrite, or another name with -o.")
        if not path.absolute().parent.is_dir():
            raise StorageError(f"{path}: there is no directory {path.parent}. Create it.")
    return Target(path)


def _frames_only(path: Path) -> bool:
    """Returns whether a directory holds nothing but what `save` writes: pictures named 0000.png and so on, and folders
    of these."""

    def is_frame(file: Path) -> bool:
        return file.suffix == ".png" and file.stem.isdecimal() and file.is_file()

    def is_video(folder: Path) -> bool:
        return folder.name.isdecimal() and folder.is_dir() and all(map(is_frame, folder.iterdir()))

    return not path.suffix and all(is_frame(item) or is_video(item) for item in path.iterdir())


def check_count(arguments: Mapping[str, Any], target: Target) -> None:
    """Raises UsageError if the pipeline, called with `arguments`, makes several pictures or videos, but `target` is the
    file of one picture or video."""
    from torch import Tensor

    if target.latents or not target.path.suffix:
        return
    for name, value in arguments.items():
        count = value if name.startswith("num_") and name.endswith("_per_prompt") else 1
        count = value if name == "batch_size" else count
        count = len(value) if isinstance(value, Tensor) and re.match(r"(pooled_)?prompt_embeds", name) else count
        if isinstance(count, int) and count > 1:
            fact = f"is one file, and --arg {name} makes {count} pictures or videos"
            raise UsageError(f"{target.path}: {fact}. Give a directory with -o.")


def save(output: Any, target: Target, fps: int) -> str:
    """Writes all pictures or videos in a pipeline's output, or its latents, to the target. Returns a description such
    as "512 x 512" or "25 frames of 512 x 512". `fps`: the frames per second of a video file.

    In a directory, pictures and the frames of a video are named 0000.png and so on; each of several videos gets a
    folder 0000 and so on. Raises UsageError if the output does not fit the target.
    """
    path = target.path
    if target.latents:
        return _save_latents(output, path)
    videos = [list(item) if isinstance(item, Sequence) else item for item in output]
    frames: list[Any] = videos[0] if isinstance(videos[0], list) else videos
    if not all(hasattr(frame, "save") for frame in frames):
        kind = type(frames[0]).__name__
        raise UsageError(f"{path}: the pipeline makes {kind}, not pictures. Give a .safetensors file with -o.")
    several = len(videos) if frames is not videos else 1
    words = f"{frames[0].width} x {frames[0].height}"
    noun = "pictures" if frames is videos else "frames"
    if not path.suffix:
        _save_directory(videos if several > 1 else frames, path)
    elif several > 1:
        raise UsageError(f"{path}: the pipeline made {several} videos. Give a directory with -o.")
    elif path.suffix.lower() == _VIDEO and (frames is not videos or len(frames) == 1):
        _save_video(frames, path, fps)
    elif len(frames) > 1:
        choice = "" if frames is videos else " or an .mp4 file"
        raise UsageError(f"{path}: the pipeline made {len(frames)} {noun}. Give a directory{choice} with -o.")
    else:
        write_bytes(path, _encoded(frames[0], _FORMATS[path.suffix.lower()]), _MODE)
    words = words if len(frames) == 1 else f"{len(frames)} {noun} of {words}"
    return words if several == 1 else f"{several} videos of {words}"


def _encoded(picture: Any, kind: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def _save_directory(items: Sequence[Any], path: Path) -> None:
    with staging(path.absolute().parent, path) as staged:
        _fill(staged, items)
        replace_directory(staged, path, _DIRECTORY_MODE)


def _fill(folder: Path, items: Sequence[Any]) -> None:
    """Writes each picture in `items` into `folder`. An item that is a list holds the frames of a video; they go into a
    folder below `folder`."""
    for index, item in enumerate(items):
        if isinstance(item, list):
            make_directory(folder / f"{index:04d}", _DIRECTORY_MODE)
            _fill(folder / f"{index:04d}", item)
        else:
            with create(folder / f"{index:04d}.png", _MODE) as sink:
                sink.write(_encoded(item, "PNG"))


def _save_video(frames: Sequence[Any], path: Path, fps: int) -> None:
    from diffusers.utils import export_to_video

    with staging(path.absolute().parent, path) as staged, storage(path):
        video = Path(export_to_video(list(frames), str(staged / path.name), fps=fps))
        write_bytes(path, video.read_bytes(), _MODE)


def _save_latents(output: Any, path: Path) -> str:
    from torch import Tensor

    from octavo.capture.tensors import Planned, write_tensors

    if not isinstance(output, Tensor):
        raise UsageError(f"{path}: the pipeline does not give latents. Give a picture file or a directory with -o.")
    with staging(path.absolute().parent, path) as staged:
        write_tensors(staged / path.name, {"latents": Planned.of(output)}, {}, _MODE)
        replace_file(staged / path.name, path)
    return f"latents {tuple(output.shape)}"
