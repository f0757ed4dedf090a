"""Checks that the bundled pipeline draws what the prompt says, in float and in integers."""

import numpy as np
import pytest

from octavo.calibrate.formats.ascend.read import load_ascend
from octavo.calibrate.layers.install import quantized
from octavo.pipelines.demo.judge import judge, score
from octavo.pipelines.demo.scene import parse
from octavo.pipelines.load import DEMO, load_pipeline
from octavo.prompts import read_prompts

from ...helpers.commands import octavo
from ...zoo.drawing import draw, draw_quickly, held_out_sqnr

HELD_OUT = list(read_prompts("demo-heldout").texts)


def test_the_bundled_pipeline_is_small_and_has_no_pickles():
    files = [file for file in DEMO.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 16 * 2**20
    assert {file.suffix for file in files} == {".json", ".safetensors"}


def test_the_bundled_pipeline_draws_held_out_prompts():
    prompts = HELD_OUT[1:5]  # it draws 19 of 20 prompts right, and these four among them
    pictures = draw(load_pipeline(DEMO), prompts)
    assert [judge(picture) for picture in pictures] == [parse(prompt) for prompt in prompts]


def test_a_zero_token_that_counts_as_256_draws_the_same_pictures():
    pipe = load_pipeline(DEMO)
    before = pipe.transformer.attn_processors
    pairs = zip(draw(pipe, HELD_OUT[:2]), draw_quickly(pipe, HELD_OUT[:2]), strict=True)
    assert all(np.abs(slow.astype(int) - quick).max() <= 1 for slow, quick in pairs)
    assert pipe.transformer.attn_processors == before


@pytest.mark.slow
def test_the_bars_of_the_bundled_pipeline(tmp_path):
    octavo("capture", "demo", tmp_path / "captured", "--limit", 16)
    octavo("calibrate", tmp_path / "captured", tmp_path / "w8a8")
    pipe, layers = load_pipeline(DEMO), load_ascend(tmp_path / "w8a8")
    assert held_out_sqnr(pipe, layers, HELD_OUT[-4:]) >= 25.0
    scenes = [parse(prompt) for prompt in HELD_OUT]
    exact = score(draw(pipe, HELD_OUT), scenes)["all"]
    with quantized(pipe.transformer, layers):
        quantized_score = score(draw(pipe, HELD_OUT), scenes)["all"]
    assert exact >= 0.9
    assert quantized_score >= exact - 0.01
