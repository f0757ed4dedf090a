"""Checks in a headless Chromium that the page loads without errors or requests, and that its controls work."""

import json
from pathlib import Path

import numpy as np
import pytest

from octavo.page import page

from ...helpers import browser

pytestmark = pytest.mark.skipif(
    browser.chromium_path() is None, reason="no Chromium on this machine (apt install chromium)"
)
COUNT = 5


def measured() -> dict:
    """Returns the measures of a comparison over five steps."""
    steps = [{"smallest": 0.01 * index, "median": 0.02 * index, "largest": 0.03 * index} for index in range(1, 6)]
    absent = dict.fromkeys(("lpips", "flip", "color_video_vdp", "text_agreement"))
    return {
        "psnr": 33.3, "ssim": 0.98, "st_lpips": 0.01, **absent, "output_sqnr": 31.0,
        "intervals": {"psnr": [31.0, 35.5], "st_lpips": [0.005, 0.02]},
        "judged": {"float": 3, "quantized": 2, "of": 3}, "latent_sqnr": 25.0, "latent_error": steps,
        "step_sqnr": [{"step": index, "sqnr": 30.0} for index in range(1, 6)],
        "speed": {"float": 2.0, "quantized": 1.0, "ratio": 2.0, "ratios": [1.9, 2.1], "runs": 3},
        "memory": {"float": 5e8, "quantized": 4e8}, "size": {"float": 9e6, "quantized": 3e6, "dtype": "float16"},
    }  # fmt: skip


def content() -> dict:
    """Returns the content of a page: a comparison of five prompts, five steps and sixty layers with long names."""
    names = [f"transformer_blocks.{index // 6}.a_rather_long_name_of_a_part.to_{index % 6}" for index in range(60)]
    layers = [
        {
            "name": name, "scheme": None if index % 9 == 0 else "W8A8", "reason": "why not" if index % 9 == 0 else None,
            "shape": [1536, 1536], "bytes_before": 4000, "bytes_after": 1000, "sqnr": 20.0 + index % 7,
            "range": [-1.5, 2.25], "scale": 0.01, "zero_point": 3,
        }
        for index, name in enumerate(names)
    ]  # fmt: skip
    sizes = {"bytes_before": 9e6, "bytes_after": 3e6}
    totals = {"quantized": 53, "kept_float": 7, "output_sqnr": 30.0, "calls": 9} | sizes
    gate = {"key": "psnr", "option": "--min-psnr", "value": 33.3, "interval": [31.0, 35.5], "bar": 32.0}
    gate |= {"at_most": False, "by": "worst", "measured": True, "passed": False, "settled": False, "more": 9}
    return {
        "model": "/models/" + "a-very-long-name" * 6, "checkpoint": "out", "component": "transformer",
        "pipeline": "StableDiffusion3Pipeline", "runs_on": "layers", "prompts_source": "images", "decoded": True,
        "surroundings": {"processor": "P, 2 threads"},
        "settings": {"num_inference_steps": 5, "seed": 0}, "note": "FLIP was not measured.",
        "gates": [gate],
        "totals": measured(),
        "prompts": [
            {
                "prompt": f"prompt {n}", "psnr": 30.0 - n % 2, "ssim": 0.9, "frames": 1, "mean_square": 1.0 + n % 2,
                "judged": {"float": True, "quantized": False},
            }
            for n in range(COUNT)
        ],
        "ranges": {"layers": names, "steps": [1, 2, 3, 4, 5], "maximum": [[1.0 + index] * 5 for index in range(60)]},
        "report": {"layers": layers, "totals": totals, "settings": {"sigma": 25.0}},
    }  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pictures = np.random.default_rng(0).integers(0, 256, (COUNT, 2, 1, 64, 64, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_bytes(page([content()], [tuple(pair) for pair in pictures]))
    return path


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory):
    with browser.browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [375, 1200])
def test_the_page_loads_whole_without_a_complaint_or_a_request_and_fits(tab, file, width, dark):
    tab.open(file, width, dark)
    assert tab.complaints() == []
    assert [url for url in tab.requests() if not url.startswith("data:")] == [file.resolve().as_uri()]
    assert tab.evaluate("[...document.images].map((i) => i.naturalWidth)") == [64] * (2 * COUNT + 2)
    assert tab.evaluate("[...document.images].every((i) => i.alt)")
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert tab.evaluate("document.querySelectorAll('svg').length") == 4
    assert tab.evaluate("[...document.querySelectorAll('svg')].every((s) => s.getBoundingClientRect().width > 200)")
    ids = json.loads(tab.evaluate("JSON.stringify([...document.querySelectorAll('[id]')].map((e) => e.id))"))
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("dark", [False, True])
def test_text_of_page_and_figures_stands_out(tab, file, dark):
    tab.open(file, 1200, dark)
    colours = tab.evaluate(
        "[document.body, ...document.querySelectorAll('h1, .note, dt, td, svg text, figcaption')].map((e) => "
        "getComputedStyle(e)[e.tagName === 'text' ? 'fill' : 'color'])"
    )
    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert min(contrast(colour, paper) for colour in set(colours)) >= 4.5


def contrast(one: str, other: str) -> float:
    """Returns the contrast ratio of two colours (Web Content Accessibility Guidelines 2.1, 2018)."""

    def luminance(colour: str) -> float:
        values = [int(v) / 255 for v in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def clip(tab: browser.Page) -> str:
    return tab.evaluate("getComputedStyle(document.getElementById('above')).clipPath")


def test_the_slider_moves_by_keys_and_moves_the_border(tab, file):
    tab.open(file)
    assert tab.evaluate("document.getElementById('slider').labels.length") == 1
    assert clip(tab) == "inset(0px 0px 0px 50%)"
    tab.evaluate("document.getElementById('slider').focus()")
    tab.press("ArrowRight", 39)
    assert clip(tab) == "inset(0px 0px 0px 51%)"
    tab.press("Home", 36)
    assert clip(tab) == "inset(0px 0px 0px 0%)"
    tab.press("End", 35)
    assert clip(tab) == "inset(0px 0px 0px 100%)"
    assert tab.complaints() == []


def test_a_pair_is_chosen_and_its_difference_shown(tab, file):
    tab.open(file)
    # prompts 1 and 3 have the largest errors
    shown = "[...document.querySelectorAll('.words')].map((e) => e.textContent.slice(-1)).join('')"
    assert tab.evaluate(shown) == "13024"
    tab.evaluate("document.querySelectorAll('.pair')[2].click()")
    assert tab.evaluate("document.getElementById('shown').textContent") == "prompt 0"
    assert tab.evaluate(
        "document.getElementById('above').src === document.querySelectorAll('.pair')[2].querySelectorAll('img')[1].src"
    )
    assert tab.evaluate("document.getElementById('below').alt") == "Float: prompt 0"
    assert tab.evaluate("document.querySelectorAll('[aria-pressed=true]').length") == 1
    tab.evaluate("document.getElementById('difference').click()")
    assert clip(tab) == "none"
    assert tab.complaints() == []


def test_the_page_of_a_calibration_loads_too(tab, tmp_path):
    (tmp_path / "report.html").write_bytes(page([{"report": content()["report"]}]))
    tab.open(tmp_path / "report.html", 375)
    assert tab.complaints() == []
    assert tab.evaluate("document.images.length") == 0
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_a_point_of_the_figure_leads_to_the_row_of_its_layer(tab, file):
    tab.open(file)
    target = "document.querySelector('details').querySelector('tr:target')"
    assert not tab.evaluate("document.querySelector('details').open")
    links = "document.querySelectorAll('[aria-label^=\\'SQNR of\\'] a')"
    assert tab.evaluate(f"{links}.length") == 53
    title = tab.evaluate(f"{links}[7].querySelector('title').textContent")
    tab.evaluate(
        "new Promise((go) => { addEventListener('hashchange', () => go(true), {once: true}); "
        f"{links}[7].dispatchEvent(new MouseEvent('click', {{bubbles: true}})); }})"
    )
    assert tab.evaluate(f"{target}.querySelector('th').textContent") == title.partition(":")[0]
    assert tab.evaluate("document.querySelector('details').open")
    assert tab.complaints() == []


@pytest.mark.parametrize("width", [390, 1280])
def test_several_checkpoints_stand_side_by_side(tab, tmp_path, width):
    pictures = np.random.default_rng(1).integers(0, 256, (COUNT, 3, 1, 16, 16, 3), dtype=np.uint8)
    contents = [content() | {"checkpoint": name} for name in ("runs/small", "runs/large")]
    contents[1]["totals"] |= {"st_lpips": 0.001, "size": {"float": 9e6, "quantized": 4e6, "dtype": "float16"}}
    (tmp_path / "report.html").write_bytes(page(contents, [tuple(row) for row in pictures]))
    tab.open(tmp_path / "report.html", width)
    assert tab.complaints() == []
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert tab.evaluate("[...document.querySelectorAll('.measures thead th')].map((e) => e.textContent).join()") == (
        "measure,1 · small,2 · large"
    )
    assert tab.evaluate("document.querySelectorAll('svg[aria-label*=\\'of 2 checkpoints\\']').length") == 2
    ids = json.loads(tab.evaluate("JSON.stringify([...document.querySelectorAll('[id]')].map((e) => e.id))"))
    assert len(ids) == len(set(ids))
    tab.evaluate("document.getElementById('checkpoint').value = '2'")
    tab.evaluate("document.getElementById('checkpoint').dispatchEvent(new Event('change'))")
    assert tab.evaluate(
        "document.getElementById('above').src === document.querySelector('.pair').querySelectorAll('img')[2].src"
    )
    assert tab.evaluate("document.getElementById('right').textContent") == "2"
