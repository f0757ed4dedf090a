"""Writing what a pipeline has made: a picture, the frames of a video, or latents."""

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from octavo.capture.errors import StorageError, UsageError
from octavo.capture.files import create, replace_directory, replace_file, staging, storage, write_bytes

_MODE, _DIRECTORY_MODE = 0o644, 0o755
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_VIDEO, _LATENTS = ".mp4", ".safetensors"


class Target(NamedTuple):
    """The file or directory of a result; its ending says picture, video or latents, none says frames."""

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
        raise UsageError(f"{path}: '{ending}' is no format. Choose of {choices}, or a directory for frames.")
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
    return not path.suffix and all(file.suffix == ".png" and file.stem.isdecimal() for file in path.iterdir())


def save(made: Any, target: Target, fps: int) -> str:
    """Writes the first of what a pipeline made; returns what that is, in words.

    Raises UsageError where it is not what the target is for.
    """
    path = target.path
    if target.latents:
        return _save_latents(made, path)
    first = made[0]
    frames = list(first) if isinstance(first, Sequence) else [first]
    if not all(hasattr(frame, "save") for frame in frames):
        kind = type(first).__name__
        raise UsageError(f"{path}: the pipeline gives no pictures but {kind}. Name a .safetensors file.")
    words = f"{frames[0].width} x {frames[0].height}"
    if not path.suffix:
        _save_frames(frames, path)
    elif path.suffix.lower() == _VIDEO:
        _save_video(frames, path, fps)
    elif len(frames) > 1:
        raise UsageError(f"{path}: the pipeline made {len(frames)} frames. Name a directory, or an .mp4 file.")
    else:
        write_bytes(path, _encoded(frames[0], _FORMATS[path.suffix.lower()]), _MODE)
    return words if len(frames) == 1 else f"{len(frames)} frames of {words}"


def _encoded(picture: Any, kind: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def _save_frames(frames: Sequence[Any], path: Path) -> None:
    with staging(path.absolute().parent, path) as staged:
        for index, frame in enumerate(frames):
            with create(staged / f"{index:04d}.png", _MODE) as sink:
                sink.write(_encoded(frame, "PNG"))
        replace_directory(staged, path, _DIRECTORY_MODE)


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
