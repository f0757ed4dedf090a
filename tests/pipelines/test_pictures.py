"""Checks that a user's pictures are read upright, as RGB with 8 bits, or refused in one line."""

from pathlib import Path

import numpy as np
import pytest
from diffusers.utils import load_image
from PIL import Image

from octavo.pipelines.images import Preprocessing, image_files, picture_of
from octavo.pipelines.pictures import open_frames, open_picture

from ..helpers.refusals import refused

VALUES = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
RGB = Image.fromarray(VALUES)


def turned(tag: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = tag
    return exif


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tif"])
def test_a_picture_is_upright_as_diffusers_loads_it(tag, ending, tmp_path):
    file = tmp_path / f"a.{ending}"
    RGB.save(file, exif=turned(tag))
    wanted = load_image(str(file))
    assert wanted.size == ((20, 12) if tag < 5 else (12, 20))
    assert np.array_equal(open_picture(file), wanted)
    assert picture_of(file, Preprocessing()).shape == (3, wanted.height, wanted.width)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_comes_out_as_diffusers_loads_it(mode, tmp_path, recwarn):
    file = tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr") else "a.png")
    RGB.convert(mode).save(file)
    picture = open_picture(file)
    assert picture.mode == "RGB"
    assert np.array_equal(picture, load_image(str(file)))
    assert not recwarn.list


def test_a_transparent_palette_is_read_without_a_warning(tmp_path, recwarn):
    RGB.convert("P").save(tmp_path / "a.png", transparency=bytes(range(256)))
    open_picture(tmp_path / "a.png")
    assert not recwarn.list


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_sixteen_bits_become_eight(ending, tmp_path):
    grey = VALUES[:, :, 0]
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / f"a.{ending}")
    assert np.array_equal(np.asarray(open_picture(tmp_path / f"a.{ending}"))[:, :, 1], grey)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_values_of_an_unknown_range_are_refused(dtype, tmp_path):
    Image.fromarray(VALUES[:, :, 0].astype(dtype)).save(tmp_path / "a.tif")
    words = "which do not say what white is. Save the picture with 8 or 16 bits"
    refused(lambda: open_picture(tmp_path / "a.tif"), 3, "a.tif", words)


@pytest.mark.parametrize("ending", ["gif", "webp", "png"])
def test_an_animation_has_frames(ending, tmp_path):
    file = tmp_path / f"a.{ending}"
    frames = [Image.new("RGB", (4, 4), (shade, 0, 0)) for shade in (0, 128, 250)]
    frames[0].save(file, save_all=True, append_images=frames[1:], **({"lossless": True} if ending == "webp" else {}))
    assert [frame.getpixel((0, 0)) for frame in open_frames(file)] == [(0, 0, 0), (128, 0, 0), (250, 0, 0)]
    assert open_picture(file).getpixel((0, 0)) == (0, 0, 0)


def halved(path: Path) -> None:
    RGB.save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def bomb(path: Path) -> None:
    path.write_bytes(b"P6 20000 20000 255\n")


def postscript(path: Path) -> None:
    RGB.save(path, "EPS")


WRONG = {
    "truncated": (halved, 3, "not a picture that can be read"),
    "empty": (Path.touch, 3, "not a picture that Pillow reads. Convert it to PNG"),
    "text": (lambda path: path.write_text("a fox"), 3, "not a picture that Pillow reads"),
    "bomb": (bomb, 3, "decompression bomb"),
    "postscript": (postscript, 3, "not a picture that Pillow reads"),
    "directory": (Path.mkdir, 2, "is a directory, not a picture"),
    "missing": (lambda path: None, 2, "no such picture. Correct the path"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_picture_is_refused_with_its_name(name, tmp_path):
    make, code, words = WRONG[name]
    make(tmp_path / "a.png")
    refused(lambda: open_picture(tmp_path / "a.png"), code, str(tmp_path / "a.png"), words)


def test_the_pictures_of_a_directory_are_those_that_pillow_decodes(tmp_path):
    for name in ("a.PNG", "b.bmp", "c.tiff", "d.gif", "e.jp2", "f.tga", "g.txt", "h.eps", "i.json"):
        (tmp_path / name).touch()
    assert [path.name[0] for path in image_files(tmp_path)] == list("abcdef")
