"""Reads the pictures of a directory and preprocesses them as the model's preprocessor_config.json says.

The preprocessing is that of transformers' own image processors, with pillow.
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
_CONFIGS = (CONFIG, "processor_config.json")  # the second one is that of newer models
_SHAPES = ((75, 75), (100, 50), (50, 100))  # height, width: pictures of one size if the preprocessing has a fixed one


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing of a picture by `processor`, an image processor of transformers.

    Without one, pictures are resized to `size` (height, width), if there is one, and have values of 0 to 1.
    """

    channels: int = 3
    size: tuple[int, int] | None = None
    processor: Any = None

    @cached_property
    def fixed(self) -> bool:
        """Whether all preprocessed pictures have one size."""
        return len({self(Image.new("RGB", (width, height))).shape for height, width in _SHAPES}) == 1

    def __call__(self, picture: Image.Image) -> Tensor:
        """The preprocessed picture, (channels, height, width) float32."""
        picture = picture.convert("RGB" if self.channels == 3 else "L")
        if self.processor is not None:
            return self.processor(images=picture, return_tensors="pt")["pixel_values"][0].float()
        if self.size:
            picture = picture.resize((self.size[1], self.size[0]), Image.Resampling.BILINEAR)
        values = np.array(picture).reshape(picture.height, picture.width, -1)
        return torch.from_numpy(values).permute(2, 0, 1).float() / 255


def preprocessing_of(directory: Path, channels: int = 3, image_size: int = 224) -> Preprocessing:
    """Reads preprocessor_config.json in `directory`; without one, pictures are `image_size` square, values 0 to 1.

    Raises FileError for a file that is no such configuration, and for a preprocessing that needs torchvision or makes
    anything but one tensor of `channels` channels.
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
            made = processor(images=sample, return_tensors="pt")
    except ImportError as error:
        fact = "names an image processor that works with torchvision alone"
        raise FileError(f"{path}: {fact}. Use --input-shape, which needs no pictures.") from error
    except Exception as error:  # transformers checks little: a wrong value is an error of any kind, in any line
        fact = first_sentence(error)[:200]
        raise FileError(f"{path}: not a preprocessor's configuration ({fact}). Correct it.") from error
    kind = type(processor).__name__
    if set(made) != {"pixel_values"}:
        raise FileError(f"{path}: {kind} makes {', '.join(made)}, not one tensor. Use --input-shape.")
    if made["pixel_values"].ndim != 4 or made["pixel_values"].shape[1] != channels:
        shape = " x ".join(map(str, made["pixel_values"].shape[1:]))
        raise FileError(f"{path}: {kind} makes pictures of {shape}, the model takes {channels} channels. Correct it.")
    return Preprocessing(channels, processor=processor)


def image_files(directory: Path) -> list[Path]:
    """The pictures in a directory and below it, sorted by name.

    Raises UsageError where there is no such directory, FileError where it holds none.
    """
    if not directory.exists():
        raise UsageError(f"{directory}: no such directory. Give one with pictures.")
    if not directory.is_dir():
        raise FileError(f"{directory}: not a directory. Give one with pictures.")
    files = sorted(path for path in directory.rglob("*") if path.suffix.lower() in suffixes() and path.is_file())
    if not files:
        raise FileError(f"{directory}: holds no pictures that Pillow reads. Give others.")
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
    return preprocessing(open_picture(path))
