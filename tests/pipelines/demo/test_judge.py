"""Checks that the judge reads scenes as drawn, also moved, resized and noisy, and sees none in other pictures."""

import random
from dataclasses import replace

import numpy as np
import pytest

from octavo.pipelines.demo.judge import judge, score
from octavo.pipelines.demo.scene import COLOURS, RELATIONS, SHAPES, Scene, parse, split
from octavo.prompts import read_prompts

TRAIN, HELD_OUT = split()
SCENE = Scene(("red", "cross"), "above", ("blue", "ring"), "white")


def pictures(count: int, noise: float):
    rng = np.random.default_rng(int(noise))
    for scene in random.Random(7).sample(TRAIN + HELD_OUT, count):
        picture = scene.draw(rng.uniform(-2.5, 2.5, (2, 2)), rng.uniform(-0.8, 0.8))
        yield scene, np.clip(picture + rng.normal(0, noise, (64, 64, 3)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("noise", [0.0, 8.0, 24.0])
def test_the_judge_reads_moved_resized_and_noised_pictures(noise):
    wrong = [(str(scene), str(judge(picture))) for scene, picture in pictures(250, noise) if judge(picture) != scene]
    assert not wrong


def test_the_judge_sees_no_scene_where_there_is_none():
    rng = np.random.default_rng(0)
    for colour in COLOURS.values():
        plain = np.full((64, 64, 3), colour, np.uint8)
        assert judge(plain) is None
        assert judge(np.clip(plain + rng.normal(0, 8, plain.shape), 0, 255).astype(np.uint8)) is None
    noise = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
    assert judge(noise) is None


def test_a_picture_with_one_shape_or_three_shows_no_scene():
    one, three = SCENE.draw(), SCENE.draw()
    one[32:] = COLOURS["white"]
    three[44:52, 4:12] = COLOURS["green"]
    assert judge(SCENE.draw()) == SCENE
    assert judge(one) is None
    assert judge(three) is None


@pytest.mark.parametrize(
    ("part", "others"),
    [
        ("shapes", [replace(SCENE, first=("red", shape)) for shape in SHAPES]),
        ("shapes", [replace(SCENE, second=("blue", shape)) for shape in SHAPES]),
        ("colours", [replace(SCENE, first=(colour, "cross")) for colour in COLOURS]),
        ("colours", [replace(SCENE, second=(colour, "ring")) for colour in COLOURS]),
        ("relation", [replace(SCENE, relation=relation) for relation in ("above", "left of")]),
        ("background", [replace(SCENE, background=colour) for colour in COLOURS]),
    ],
)
def test_a_picture_that_differs_in_one_part_is_told_apart(part, others):
    for other in others:
        if len({other.first[0], other.second[0], other.background}) == 3:
            assert judge(other.draw()) == other
            scores = score([other.draw()], [SCENE])
            assert [name for name, share in scores.items() if not share] == ([] if other == SCENE else ["all", part])


@pytest.mark.parametrize("relation", RELATIONS)
def test_both_prompts_of_a_picture_are_one_scene(relation):
    scene, other = replace(SCENE, relation=relation), Scene(SCENE.second, RELATIONS[relation], SCENE.first, "white")
    assert scene == other
    assert hash(scene) == hash(other)
    assert str(scene) != str(other)
    assert (scene.draw() == other.draw()).all()
    assert str(scene.in_reading_order()) == str(other.in_reading_order())
    assert scene != replace(scene, relation=RELATIONS[relation])


def test_prompts_and_scenes_convert_into_each_other():
    for scene in random.Random(0).sample(TRAIN, 300):
        assert str(parse(str(scene))) == str(scene)
    with pytest.raises(ValueError, match="not a scene"):
        parse("an otter on a skateboard")


def test_the_held_out_prompts_were_kept_out_of_training():
    held_out = {parse(text) for text in read_prompts("demo-heldout").texts}
    assert len(held_out) == 200
    assert held_out <= set(HELD_OUT)
    assert not set(HELD_OUT) & set(TRAIN)
    shown = {parse(text) for text in read_prompts("demo").texts}
    assert len(shown) == 64
    assert shown <= set(TRAIN)
