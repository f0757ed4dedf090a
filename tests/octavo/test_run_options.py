"""Checks the values of --arg: JSON, pictures and tensors, their descriptions in a capture, and what is refused
early."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from octavo.commands.capture_options import CaptureOptions
from octavo.commands.generate_options import GenerateOptions
from octavo.pipelines.run import RunSettings, described

from ..helpers.refusals import refused


def value_of(text: str) -> Any:
    settings = CaptureOptions(model="m", capture=Path("c"), arguments=(text,)).settings
    return settings.arguments[text.partition("=")[0]]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    exif = Image.Exif()
    exif[0x0112] = 6  # the orientation tag: rotated by 90 degrees
    Image.new("RGB", (96, 64), (40, 60, 200)).save("photo.jpg", exif=exif)
    for name in ("a.png", "b.bmp", "c.tif", "d.gif", "plain"):
        Image.new("RGB", (4, 3), (1, 2, 3)).save(name, None if "." in name else "PNG")
    frames = [Image.new("RGB", (4, 3), (shade, 0, 0)) for shade in (0, 200)]
    frames[0].save("film.gif", save_all=True, append_images=frames[1:])
    Path("text.png").write_text("a fox")
    save_file({"prompt_embeds": torch.ones(1, 3, 2), "pooled_prompt_embeds": torch.zeros(1, 2)}, "both.safetensors")
    save_file({"x": torch.ones(1, 3, 2)}, "one.safetensors")
    torch.save({"prompt_embeds": torch.ones(1, 3, 2)}, "one.pt")
    np.save("one.npy", np.ones((1, 3, 2), np.float32))
    Path("cut.safetensors").write_bytes(Path("both.safetensors").read_bytes()[:100])
    return tmp_path


def test_pictures_are_opened_upright_and_whatever_their_ending(folder):
    assert value_of("image=photo.jpg").size == (64, 96)
    for name in ("a.png", "b.bmp", "c.tif", "d.gif", "plain", "~/a.png"):
        assert value_of(f"image={name}").getpixel((0, 0)) == (1, 2, 3)
    assert value_of('image="a.png"').size == value_of("ip_adapter=a.png").size == (4, 3)
    nested = value_of('ip_adapter_image=[["a.png", "b.bmp"], "c.tif"]')
    assert [len(nested), [picture.size for picture in nested[0]]] == [2, [(4, 3), (4, 3)]]


def test_an_animation_is_its_first_frame_or_a_video(folder, caplog):
    assert value_of("image=film.gif").size == (4, 3)
    assert "holds 2 pictures. Only the first one is used." in caplog.text
    assert [frame.getpixel((0, 0))[0] for frame in value_of("video=film.gif")] == [0, 200]
    assert len(value_of('video=["a.png", "b.bmp"]')) == 2


@pytest.mark.parametrize("name", ["both.safetensors", "one.safetensors", "one.pt", "one.npy"])
def test_tensors_come_from_files(folder, name):
    assert torch.equal(value_of(f"prompt_embeds={name}"), torch.ones(1, 3, 2))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("eta=0.5", 0.5), ("sigmas=[1, 0.5]", [1, 0.5]), ("clip_skip=null", None), ("clean_caption=false", False),
        ("prompt_2=a red ring", "a red ring"), ('prompt_2="7"', "7"), ('prompt_2="logo.png"', "logo.png"),
        ("cross_attention_kwargs={\"scale\": 2}", {"scale": 2}), ("prompt_2=see http://x.org/y", "see http://x.org/y"),
    ],
)  # fmt: skip
def test_json_and_texts_are_themselves(text, value):
    assert value_of(text) == value


WRONG = {
    "image=mistyped.png": (2, "mistyped.png: no such picture. Correct the path"),
    "mask_image=mistyped": (2, "no such picture"),
    'image=["a.png", "mistyped.png"]': (2, "mistyped.png: no such picture"),
    "image=text.png": (3, "text.png: not a picture that Pillow reads"),
    "image=.": (2, "a directory"),
    "image=https://example.org/a.png": (2, "downloads nothing. Give the path of a file"),
    "prompt_embeds=mistyped.safetensors": (2, "no such file. Correct the path of the tensors"),
    "prompt_embeds=a.png": (2, "not a file of tensors"),
    "prompt_embeds=cut.safetensors": (3, "cut.safetensors: truncated or damaged"),
    "negative_prompt_embeds=both.safetensors": (3, "has no tensor negative_prompt_embeds (its tensors: "),
    "clean_caption=False": (2, "False would be read as a text. Write false"),
    "eta=.5": (2, ".5 is not valid JSON"),
    "sigmas=[1, 0.5": (2, "is not valid JSON"),
    "prompt=a fox": (2, "cannot be set with --arg. Use --prompts"),
    "num_inference_steps=3": (2, "Use --steps"),
    "height=32": (2, "Use --height"),
    "negative_prompt=x": (2, "Use --negative-prompt"),
    "generator=3": (2, "Use --seed"),
    "num_frames=3": (2, "Use --frames"),
    "callback_on_step_end=3": (2, "Octavo sets this argument itself"),
    "strength": (2, "not of the form NAME=VALUE"),
}


@pytest.mark.parametrize("text", WRONG)
def test_invalid_values_are_refused_before_a_model_is_loaded(folder, text):
    code, words = WRONG[text]
    refused(partial(value_of, text), code, "--arg", words)


def test_an_argument_is_given_once_and_generate_sets_more_itself():
    twice = CaptureOptions(model="m", capture=Path("c"), arguments=("eta=1", "eta=2"))
    refused(lambda: twice.settings, 2, "--arg eta: is given twice")
    assert CaptureOptions(model="m", capture=Path("c"), arguments=("output_type=pil",)).settings
    for text, words in (("output_type=pil", "sets this argument itself"), ("prompt=x", "Use PROMPT")):
        options = GenerateOptions(model="m", prompt="p", out=Path("o"), arguments=(text,))
        refused(lambda options=options: options.settings, 2, words)


def test_values_are_known_by_their_content():
    picture, other = (Image.new("RGB", (4, 3), (shade, 0, 0)) for shade in (1, 2))
    assert described([picture]) == described([picture.copy()]) != described([other])
    assert described(picture) != described(picture.convert("RGBA"))
    assert described(picture) != described(picture.resize((3, 4)))
    ones = torch.ones(2, 3)
    assert described({"a": ones, "b": 1}) == described({"b": 1, "a": ones.clone()})
    assert len({described(x) for x in (ones, ones.half(), ones.view(3, 2), ones * 2, torch.bfloat16)}) == 5
    assert "0x" not in described([picture, ones, torch.float16])
    refused(lambda: described(object()), 2, "object: a capture cannot record this value")


@pytest.mark.parametrize("value", [None, True, 1, 0.5, "text", [1, [2.0, "x"]], {"a": [None]}])
def test_json_values_are_described_by_a_literal_that_can_be_read_again(value):
    import ast

    assert ast.literal_eval(described(value)) == value
    assert json.dumps(RunSettings(arguments={"x": value}).as_dict())
