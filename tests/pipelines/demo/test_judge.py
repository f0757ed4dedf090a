"""Checks that the judge reads scenes as drawn, also moved, resized and noisy, and sees none in a plain picture."""

import random
from dataclasses import replace

import numpy as np
import pytest

from octavo.pipelines.demo.judge import judge, score
from octavo.pipelines.demo.scene import COLOURS, PLACES, RADII, SHAPES, Scene, parse, split
from octavo.prompts import read_prompts

TRAIN, HELD_OUT = split()


def pictures(count: int, noise: float):
    rng = np.random.default_rng(int(noise))
    for scene in random.Random(7).sample(TRAIN + HELD_OUT, count):
        picture = scene.draw(*rng.uniform(-2, 2, 2), rng.uniform(-0.7, 0.7)) + rng.normal(0, noise, (64, 64, 3))
        yield scene, np.clip(picture, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("noise", [0.0, 8.0, 24.0])
def test_the_judge_reads_moved_resized_and_noised_pictures(noise):
    wrong = [(str(scene), str(judge(picture))) for scene, picture in pictures(250, noise) if judge(picture) != scene]
    assert not wrong


def test_the_judge_sees_no_shape_where_there_is_none():
    rng = np.random.default_rng(0)
    for colour in COLOURS.values():
        plain = np.full((64, 64, 3), colour, np.uint8)
        assert judge(plain) is None
        assert judge(np.clip(plain + rng.normal(0, 8, plain.shape), 0, 255).astype(np.uint8)) is None
    noise = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
    assert judge(noise) is None


@pytest.mark.parametrize(
    ("attribute", "values"),
    [("shape", SHAPES), ("colour", COLOURS), ("size", RADII), ("place", PLACES), ("background", COLOURS)],
)
def test_a_picture_that_differs_in_one_attribute_is_told_apart(attribute, values):
    scene = Scene("medium", "red", "cross", "in the center", "white")
    for value in values:
        other = replace(scene, **{attribute: value})
        if other.colour != other.background:
            assert judge(other.draw()) == other
            assert score([other.draw()], [scene])[attribute] == (other == scene)


def test_prompts_and_scenes_convert_into_each_other():
    for scene in random.Random(0).sample(TRAIN, 300):
        assert parse(str(scene)) == scene
    with pytest.raises(ValueError, match="not a scene"):
        parse("an otter on a skateboard")


def test_the_held_out_prompts_were_kept_out_of_training():
    held_out = {parse(text) for text in read_prompts("demo-heldout").texts}
    assert len(held_out) == 200
    assert held_out <= set(HELD_OUT)
    assert not held_out & set(TRAIN)
    shown = {parse(text) for text in read_prompts("demo").texts}
    assert len(shown) == 64
    assert shown <= set(TRAIN)
