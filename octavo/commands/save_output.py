"""Writing what a pipeline has made: pictures, videos, or latents."""

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

_MODE, _DIRECTORY_MODE = 0o644, 0o755
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_VIDEO, _LATENTS = ".mp4", ".safetensors"


class Target(NamedTuple):
    """The file or directory of a result; its ending says picture, video or latents, none says pictures or frames."""

    path: Path

    @property
    def latents(self) -> bool:
        """Whether it is for latents, which are not decoded."""
        return self.path.suffix.lower() == _LATENTS


def target_of(path: Path, overwrite: bool) -> Target:
    """The target of that name, before anything is loaded.

    Raises UsageError for an ending that means nothing, and for video where nothing writes it; StorageError for what is
    there already without `overwrite`, and a folder that is not there.
    """
    ending = path.suffix.lower()
    if ending and ending not in (*_FORMATS, _VIDEO, _LATENTS):
        choices = ", ".join((*_FORMATS, _VIDEO, _LATENTS))
        raise UsageError(f"{path}: '{ending}' is no format. Choose of {choices}, or a directory for pictures.")
    if ending == _VIDEO and not all(importlib.util.find_spec(name) for name in ("imageio", "imageio_ffmpeg")):
        raise UsageError(f"{path}: needs imageio and imageio-ffmpeg. Install them, or name a directory for frames.")
    with storage(path):
        if path.is_dir() and (ending or any(path.iterdir())) and not (overwrite and _frames_only(path)):
            raise StorageError(f"{path}: a directory that is not empty. Name another.")
        if path.exists() and not path.is_dir() and not overwrite:
            raise StorageError(f"{path}: exists. Use --overwrite or another name.")
        if not path.absolute().parent.is_dir():
            raise StorageError(f"{path}: there is no directory {path.parent}. Make it.")
    return Target(path)


def _frames_only(path: Path) -> bool:
    """Whether all that is in a directory is what `save` writes there."""

    def frame(file: Path) -> bool:
        return file.suffix == ".png" and file.stem.isdecimal() and file.is_file()

    def video(folder: Path) -> bool:
        return folder.name.isdecimal() and folder.is_dir() and all(map(frame, folder.iterdir()))

    return not path.suffix and all(frame(item) or video(item) for item in path.iterdir())


def check_count(arguments: Mapping[str, Any], target: Target) -> None:
    """Raises UsageError where a call with these arguments makes several pictures or videos and the target takes one."""
    from torch import Tensor

    if target.latents or not target.path.suffix:
        return
    for name, value in arguments.items():
        count = value if name.startswith("num_") and name.endswith("_per_prompt") else 1
        count = value if name == "batch_size" else count
        count = len(value) if isinstance(value, Tensor) and re.match(r"(pooled_)?prompt_embeds", name) else count
        if isinstance(count, int) and count > 1:
            raise UsageError(f"{target.path}: takes one, and --arg {name} makes {count}. Name a directory.")


def save(made: Any, target: Target, fps: int) -> str:
    """Writes all pictures or videos that a pipeline made; returns what they are, in words.

    A directory takes pictures and the frames of one video as 0000.png and so on, and several videos in folders 0000 and
    so on. Raises UsageError where they are not what the target is for.
    """
    path = target.path
    if target.latents:
        return _save_latents(made, path)
    videos = [list(item) if isinstance(item, Sequence) else item for item in made]
    frames: list[Any] = videos[0] if isinstance(videos[0], list) else videos
    if not all(hasattr(frame, "save") for frame in frames):
        kind = type(frames[0]).__name__
        raise UsageError(f"{path}: the pipeline gives no pictures but {kind}. Name a .safetensors file.")
    several = len(videos) if frames is not videos else 1
    words = f"{frames[0].width} x {frames[0].height}"
    noun = "pictures" if frames is videos else "frames"
    if not path.suffix:
        _save_directory(videos if several > 1 else frames, path)
    elif several > 1:
        raise UsageError(f"{path}: the pipeline made {several} videos. Name a directory.")
    elif path.suffix.lower() == _VIDEO and (frames is not videos or len(frames) == 1):
        _save_video(frames, path, fps)
    elif len(frames) > 1:
        way = "" if frames is videos else ", or an .mp4 file"
        raise UsageError(f"{path}: the pipeline made {len(frames)} {noun}. Name a directory{way}.")
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
    """Writes pictures into a folder, each video into a folder of its own."""
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


def _save_latents(made: Any, path: Path) -> str:
    from torch import Tensor

    from octavo.capture.tensors import Planned, write_tensors

    if not isinstance(made, Tensor):
        raise UsageError(f"{path}: the pipeline gives no latents. Name a picture or a directory.")
    with staging(path.absolute().parent, path) as staged:
        write_tensors(staged / path.name, {"latents": Planned.of(made)}, {}, _MODE)
        replace_file(staged / path.name, path)
    return f"latents {tuple(made.shape)}"
