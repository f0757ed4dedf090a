"""Opens pictures as upright RGB with 8 bits a channel.

The result equals `load_image` of diffusers and of transformers: rotated as the EXIF tag says, without alpha, colour
profiles not applied. One difference: grey pictures of 16 bits are scaled to 8 bits, where both libraries give white.
"""

import warnings
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from octavo.capture.errors import FileError, UsageError, first_sentence

# formats that Pillow lists but does not decode: EPS starts Ghostscript, WMF needs Windows, the others are stubs
_NOT_DECODED = frozenset({"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"})
_SIXTEEN_BITS = 65535 / 255  # white in 16 bits divided by white in 8 bits


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(kind for kind in Image.OPEN if kind not in _NOT_DECODED)


@cache
def suffixes() -> frozenset[str]:
    """Returns the endings of the names of files that Pillow decodes, in small letters with the dot."""
    return frozenset(end.lower() for end, kind in Image.registered_extensions().items() if kind in _formats())


def open_picture(path: Path) -> Image.Image:
    """Opens a picture, or the first frame of an animation, as an upright RGB picture.

    Raises UsageError for a missing file, FileError for a file that is not a picture, is damaged, or has 32-bit values,
    because such a file does not say which value is white.
    """
    return open_frames(path, 1)[0]


def open_frames(path: Path, most: int | None = None) -> list[Image.Image]:
    """Opens all frames of an animation, or the first `most`, as upright RGB pictures; a still picture has one frame.

    Raises UsageError for a missing file or a directory, FileError for a file that is not a picture, is damaged, or has
    32-bit values, because such a file does not say which value is white.
    """
    if not path.exists():
        raise UsageError(f"{path}: no such picture. Correct the path.")
    if path.is_dir():
        raise UsageError(f"{path}: is a directory, not a picture. Give the file of a picture.")
    if not path.is_file():
        raise FileError(f"{path}: not a regular file. Give the file of a picture.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", Image.DecompressionBombWarning
            )  # Pillow raises an error at twice as many pixels
            with Image.open(path, formats=_formats()) as opened:
                frames = []
                for index in range(min(frames_of(opened), most or frames_of(opened))):
                    opened.seek(index)
                    frames.append(_upright(opened))
                return frames
    except FileError as error:
        raise FileError(f"{path}: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise FileError(f"{path}: not a picture that Pillow reads. Convert it to PNG, or leave it out.") from error
    except Exception as error:  # the decoders of some eighty formats raise errors of all types
        fact = first_sentence(error) or type(error).__name__
        raise FileError(f"{path}: not a picture that can be read ({fact}). Repair it, or leave it out.") from error


def frames_of(opened: Image.Image) -> int:
    """Returns the number of frames of an open file: 1 for a still picture. Also 1 for an MPO, a JPEG file with several
    pictures, because the further pictures are not frames of an animation."""
    return 1 if opened.format == "MPO" else getattr(opened, "n_frames", 1)


def count_frames(path: Path) -> int:
    """Returns the number of frames in a file that `open_frames` opens."""
    with Image.open(path, formats=_formats()) as opened:
        return frames_of(opened)


def _upright(opened: Image.Image) -> Image.Image:
    kind = opened.format
    picture = ImageOps.exif_transpose(opened)
    mode = picture.mode
    if mode.startswith("I;16") or (mode == "I" and kind in ("PNG", "PPM")):
        values = np.asarray(picture).astype(np.float64)
        return Image.fromarray(np.rint(values / _SIXTEEN_BITS).clip(0, 255).astype(np.uint8)).convert("RGB")
    if mode in ("I", "F"):
        fact = f"has values of {'32-bit integers' if mode == 'I' else '32-bit floats'}, which do not say what white is"
        raise FileError(f"{fact}. Save the picture with 8 or 16 bits.")
    if mode in ("P", "PA"):
        picture = picture.convert("RGBA")  # converting to RGB directly would warn about transparent colours
    return picture.convert("RGB")
