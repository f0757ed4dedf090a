"""Checks the perceptual measures: those that are installed here, and what is said of those that are not."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from octavo.comparing import perceptual
from octavo.comparing.lpips import learned_distance, lpips, st_lpips
from octavo.comparing.perceptual import NAMES, Perceptual
from octavo.comparing.reading import Reader, agreement, asked_text

CPU = torch.device("cpu")


def scene(text: str = "", blur: float = 0.0) -> np.ndarray:
    """Draws a picture, uint8 (1, 160, 320, 3), with `text` or, without one, with a disc, blurred by `blur` pixels."""
    picture = Image.new("RGB", (320, 160), "white")
    pen = ImageDraw.Draw(picture)
    if text:
        pen.text((20, 50), text, fill="black", font=ImageFont.load_default(48))
    else:
        pen.ellipse((100, 30, 200, 130), fill="purple")
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(blur)))[None]


def ordered(distance) -> bool:
    """Returns whether a distance is 0 for equal pictures and grows with the blur."""
    values = [distance(scene(), scene(blur=blur)) for blur in (0.0, 1.0, 6.0)]
    return values[0] == pytest.approx(0.0, abs=1e-6) and values[0] < values[1] < values[2]


def test_st_lpips_grows_with_the_difference():
    pytest.importorskip("stlpips_pytorch")
    network = st_lpips()
    assert ordered(lambda a, b: learned_distance(network, a, b))
    assert learned_distance(network, scene()[:, :20], scene()[:, :20]) is None
    # computed once by the package's own class, stlpips.LPIPS(net="alex", variant="shift_tolerant")
    x, y = torch.linspace(-1, 1, 64 * 64 * 3).view(1, 3, 64, 64), torch.linspace(1, -1, 64 * 64 * 3).view(1, 3, 64, 64)
    assert float(network(x, y)) == pytest.approx(0.9962285, rel=1e-4)


def test_flip_grows_with_the_difference():
    pytest.importorskip("flip_evaluator")
    measure = Perceptual(CPU, 8.0)
    assert ordered(lambda a, b: measure.measured("a disc", a, b).values["flip"])


@pytest.mark.slow
def test_text_is_read_if_the_prompt_asks_for_it():
    pytest.importorskip("rapidocr")
    seen = Perceptual(CPU, 8.0).measured('a sign "OPEN LATE"', scene("OPEN LATE"), scene("OPEN GATE"))
    assert seen.text == {"asked": "OPEN LATE", "float": "OPEN LATE", "quantized": "OPEN GATE", "agreement": 14 / 16}
    assert seen.values["text_agreement"] == 14 / 16
    assert Reader.load().read(scene()[0]) == ""


def test_what_is_asked_for_and_how_far_texts_agree():
    assert asked_text('a sign "OPEN" beside “24 hours”') == "OPEN 24 hours"
    assert asked_text("a dog's bone") == ""
    assert agreement("Open Late", "OPENLATE") == 1.0
    assert agreement("", "abc") == 0.0
    assert agreement("", " ") is None


def test_what_is_missing_is_said_in_one_line_and_never_computed_by_something_else(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert lpips() is None
    monkeypatch.setattr(perceptual.importlib.util, "find_spec", lambda name: None)
    measure = Perceptual(CPU, 8.0)
    assert measure.measured('a "sign"', scene(), scene()).values == dict.fromkeys(NAMES)
    assert measure.note == "Not measured: ST-LPIPS, FLIP and OCR agreement (pip install 'octavo[metrics]')."
