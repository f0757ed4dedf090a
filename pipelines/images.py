"""Reads the pictures of a directory and preprocesses them as the model's preprocessor_config.json says.

The image processors of the library transformers do the preprocessing, with pillow as their backend.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor

from octavo.capture.errors import FileError, UsageError, first_sentence

from .load import quiet
from .pictures import open_picture, suffixes

CONFIG = "preprocessor_config.json"
_CONFIGS = (CONFIG, "processor_config.json")  # newer models have the second
_SHAPES = (
    (75, 75),
    (100, 50),
    (50, 100),
)  # (height, width) of three probes: of one shape after a preprocessing with a fixed size


@dataclass(frozen=True)
class Preprocessing:
    """Preprocesses pictures with `processor`, an image processor of transformers. The model takes `channels` channels:
    3 for RGB, 1 for grey.

    Without a processor, pictures are resized to `size`, (height, width) in pixels, or keep their size if `size` is
    None; their values are scaled to 0..1.
    """

    channels: int = 3
    size: tuple[int, int] | None = None
    processor: Any = None

    @cached_property
    def fixed(self) -> bool:
        """True if all preprocessed pictures have the same size, whatever size they had before."""
        return len({self(Image.new("RGB", (width, height))).shape for height, width in _SHAPES}) == 1

    def __call__(self, picture: Image.Image) -> Tensor:
        """Returns the preprocessed picture, (channels, height, width) float32."""
        picture = picture.convert("RGB" if self.channels == 3 else "L")
        if self.processor is not None:
            return self.processor(images=picture, return_tensors="pt")["pixel_values"][0].float()
        if self.size:
            picture = picture.resize((self.size[1], self.size[0]), Image.Resampling.BILINEAR)
        values = np.array(picture).reshape(picture.height, picture.width, -1)
        return torch.from_numpy(values).permute(2, 0, 1).float() / 255


def preprocessing_of(directory: Path, channels: int = 3, image_size: int = 224) -> Preprocessing:
    """Reads preprocessor_config.json in `directory`. Without that file, pictures become squares of `image_size` pixels
    a side, with values from 0 to 1.

    Raises FileError for a file that is not such a configuration, for a processor that needs torchvision, and for a
    processor that returns anything but one tensor with `channels` channels.
    """
    path = next((directory / name for name in _CONFIGS if (directory / name).is_file()), None)
    if path is None:
        return Preprocessing(channels, size=(image_size, image_size))
    try:
        with quiet():
            processor = AutoImageProcessor.from_pretrained(
                directory, backend="pil", local_files_only=True, trust_remote_code=False
            )
            sample = Image.new("RGB" if channels == 3 else "L", (64, 64))
            outputs = processor(images=sample, return_tensors="pt")
    except ImportError as error:
        fact = "names an image processor that only works with torchvision"
        raise FileError(f"{path}: {fact}. Use --input-shape, which needs no pictures.") from error
    except Exception as error:  # transformers checks little: a wrong value is an error of any kind, in any line
        fact = first_sentence(error)[:200]
        raise FileError(f"{path}: not a preprocessor's configuration ({fact}). Correct it.") from error
    kind = type(processor).__name__
    if set(outputs) != {"pixel_values"}:
        raise FileError(f"{path}: {kind} returns {', '.join(outputs)}, not one tensor. Use --input-shape.")
    if outputs["pixel_values"].ndim != 4 or outputs["pixel_values"].shape[1] != channels:
        shape = " x ".join(map(str, outputs["pixel_values"].shape[1:]))
        raise FileError(
            f"{path}: the image processor {kind} of this file returns tensors of {shape}, "
            f"but the model takes {channels} channels. Correct the file."
        )
    return Preprocessing(channels, processor=processor)


def image_files(directory: Path) -> list[Path]:
    """Returns the files in a directory and its subdirectories whose names have the ending of a picture (`suffixes`),
    sorted by path.

    Raises UsageError for a missing directory, FileError for a directory without pictures.
    """
    if not directory.exists():
        raise UsageError(f"{directory}: no such directory. Give a directory with pictures.")
    if not directory.is_dir():
        raise FileError(f"{directory}: is not a directory. Give a directory with pictures.")
    files = sorted(path for path in directory.rglob("*") if path.suffix.lower() in suffixes() and path.is_file())
    if not files:
        raise FileError(f"{directory}: holds no pictures that Pillow reads. Give a directory with pictures.")
    return files


def batches(files: Sequence[Path], preprocessing: Preprocessing, batch: int) -> Iterator[Tensor]:
    """Yields batches of at most `batch` pictures, (pictures, channels, height, width). Each batch is read when it is
    requested, and the last one may be smaller.

    If the preprocessing keeps the pictures' own sizes, every batch has one picture. Raises FileError for a picture that
    cannot be read.
    """
    batch = batch if preprocessing.fixed else 1
    for start in range(0, len(files), batch):
        yield torch.stack([picture_of(path, preprocessing) for path in files[start : start + batch]])


def picture_of(path: Path, preprocessing: Preprocessing) -> Tensor:
    """Reads and preprocesses one picture, (channels, height, width) float32. Raises FileError for a file that cannot be
    read."""
    return preprocessing(open_picture(path))
