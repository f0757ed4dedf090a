"""Reads the pictures of a directory and preprocesses them as the model's preprocessor_config.json says.

Resizes, crops, rescales and normalises as the image processors of transformers do with pillow (ViT, CLIP, ConvNext,
which ResNet uses too, and similar ones).
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from octavo.capture.errors import FileError, UsageError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
CONFIG = "preprocessor_config.json"
_LIMIT = 1 << 20  # bytes; the most that is read of preprocessor_config.json
_CROP = 384  # pixels; from this size on, ConvNext squeezes pictures and does not crop them


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing of a picture: resized to `size` or to the `shortest` edge, cropped to the middle `crop`,
    scaled, normalised."""

    channels: int = 3
    size: tuple[int, int] | None = None  # height, width
    shortest: int | None = None
    crop: tuple[int, int] | None = None
    resample: int = 2  # pillow's number: bilinear
    scale: float = 1 / 255
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @property
    def fixed(self) -> bool:
        """Whether all preprocessed pictures have one size."""
        return self.size is not None or self.crop is not None

    def __call__(self, picture: Image.Image) -> Tensor:
        """The preprocessed picture, (channels, height, width) float32."""
        picture = picture.convert("RGB" if self.channels == 3 else "L")
        if size := self._size(picture):
            picture = picture.resize((size[1], size[0]), Image.Resampling(self.resample))
        values = np.asarray(picture).reshape(picture.height, picture.width, -1)
        x = torch.from_numpy(_cropped(values, self.crop).copy()).permute(2, 0, 1).float() * self.scale
        if self.mean:
            x = (x - torch.tensor(self.mean).view(-1, 1, 1)) / torch.tensor(self.std).view(-1, 1, 1)
        return x

    def _size(self, picture: Image.Image) -> tuple[int, int] | None:
        if self.shortest is None:
            return self.size
        low = min(picture.size)
        return picture.height * self.shortest // low, picture.width * self.shortest // low


def _cropped(values: np.ndarray, crop: tuple[int, int] | None) -> np.ndarray:
    """The middle `crop` of a picture, with zeros around a smaller picture."""
    if crop is None:
        return values
    missing = [max(0, want - have) for want, have in zip(crop, values.shape, strict=False)]
    if any(missing):
        around = [((each + 1) // 2, each // 2) for each in missing]
        values = np.pad(values, (*around, (0, 0)))
    top, left = ((have - want) // 2 for want, have in zip(crop, values.shape, strict=False))
    return values[top : top + crop[0], left : left + crop[1]]


def preprocessing_of(directory: Path, channels: int = 3, image_size: int = 224) -> Preprocessing:
    """Reads preprocessor_config.json in `directory`; without one, pictures are `image_size` square, values 0 to 1.

    Raises FileError for a file that is no such configuration.
    """
    path = directory / CONFIG
    if not path.is_file():
        return Preprocessing(channels, size=(image_size, image_size))
    try:
        found = json.loads(path.read_bytes()[:_LIMIT])
        return _read(found, channels)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FileError(f"{path}: not a preprocessor's configuration ({error}). Correct it.") from error


def _read(found: dict[str, Any], channels: int) -> Preprocessing:
    size = shortest = crop = None
    wanted = found.get("size")
    if found.get("do_resize", True) and wanted is not None:
        shortest, size = _sizes(wanted)
        ratio = found.get("crop_pct")
        if ratio and shortest and shortest < _CROP:
            crop, shortest = (shortest, shortest), int(shortest / ratio)
        elif ratio and shortest:
            size, shortest = (shortest, shortest), None
    if found.get("do_center_crop") and found.get("crop_size"):
        edge, crop = _sizes(found["crop_size"])
        crop = crop if edge is None else (edge, edge)
    mean, std = tuple(found.get("image_mean") or ()), tuple(found.get("image_std") or ())
    if not found.get("do_normalize", True):
        mean = std = ()
    if len(mean) != len(std) or (mean and len(mean) not in (1, channels)):
        raise ValueError(f"image_mean and image_std of {len(mean)} and {len(std)} channels")
    scale = float(found.get("rescale_factor", 1 / 255)) if found.get("do_rescale", True) else 1.0
    resample = Image.Resampling(int(found.get("resample", 2)))
    return Preprocessing(
        channels, size, shortest, crop, resample, scale, tuple(map(float, mean)), tuple(map(float, std))
    )


def _sizes(value: Any) -> tuple[int | None, tuple[int, int] | None]:
    """The shortest edge, or height and width."""
    if isinstance(value, dict) and "shortest_edge" in value:
        return int(value["shortest_edge"]), None
    if isinstance(value, dict):
        return None, (int(value["height"]), int(value["width"]))
    return None, (int(value), int(value))


def image_files(directory: Path) -> list[Path]:
    """The pictures in a directory and below it, sorted by name.

    Raises UsageError where there is no such directory, FileError where it holds none.
    """
    if not directory.exists():
        raise UsageError(f"{directory}: no such directory. Give one with pictures.")
    if not directory.is_dir():
        raise FileError(f"{directory}: not a directory. Give one with pictures.")
    files = sorted(path for path in directory.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise FileError(f"{directory}: holds no pictures ({', '.join(sorted(SUFFIXES))}). Give others.")
    return files


def batches(files: Sequence[Path], preprocessing: Preprocessing, batch: int) -> Iterator[Tensor]:
    """Yields batches of pictures (batch, channels, height, width), read as they are asked for; the last may be smaller.

    Pictures that keep their own sizes come one by one. Raises FileError for a picture that cannot be read.
    """
    batch = batch if preprocessing.fixed else 1
    for start in range(0, len(files), batch):
        yield torch.stack([picture_of(path, preprocessing) for path in files[start : start + batch]])


def picture_of(path: Path, preprocessing: Preprocessing) -> Tensor:
    """Reads and preprocesses one picture. Raises FileError for a file that cannot be read."""
    try:
        with Image.open(path) as opened:
            return preprocessing(opened)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise FileError(f"{path}: not a picture that can be read. Repair it or take it away.") from error
