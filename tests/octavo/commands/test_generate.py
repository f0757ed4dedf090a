"""Checks `octavo generate` with float models, checkpoints of every format and quantized pipelines, and what it
refuses."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from octavo.calibrate.formats.manifest import MANIFEST
from octavo.capture.devices import resolve_device
from octavo.checkpoints import open_pipeline
from octavo.commands.save_output import Target, save, target_of
from octavo.pipelines.demo.judge import judge
from octavo.pipelines.demo.scene import parse
from octavo.pipelines.load import DEMO_INT8
from octavo.prompts import read_prompts

from ...helpers.commands import capture, errors, octavo
from ...zoo.exported_sd3 import WEIGHTS, integer_layers

SMALL = ("--steps", 2, "--height", 16, "--width", 16, "--device", "cpu")
PROMPT = read_prompts("demo-heldout").texts[1]  # the float model does not draw the first one right


@pytest.fixture(scope="module")
def checkpoints(checkpoint: Callable[..., Path]) -> dict[str, Path]:
    """Calibrates one capture in the formats `ascend` and `diffusers`, alone and with others. Read only."""
    cases = {name: name for name in ("ascend", "diffusers")} | {
        "both": "ascend,diffusers,torchao", "below": "torchao,diffusers", "beside": "torchao,ascend",
    }  # fmt: skip
    return {name: checkpoint("--format", formats, "--accuracy", "plain") for name, formats in cases.items()}


def pixels(path: Path) -> bytes:
    with Image.open(path) as picture:
        return picture.convert("RGB").tobytes()


def test_every_format_draws_the_same_picture_and_the_float_model_another(tiny_model, checkpoints, tmp_path):
    for name in checkpoints:
        output = octavo("generate", checkpoints[name], "a red circle", "-o", tmp_path / f"{name}.png", *SMALL)
        assert "16 x 16, 2 steps" in output
    octavo("generate", tiny_model, "a red circle", "-o", tmp_path / "float.png", *SMALL)
    drawn = {path.stem: pixels(path) for path in tmp_path.glob("*.png")}
    assert drawn["diffusers"] == drawn["both"] == drawn["below"]
    assert drawn["ascend"] == drawn["beside"]
    near = [abs(a - b) for a, b in zip(drawn["ascend"], drawn["diffusers"], strict=True)]
    assert max(near) <= 2
    assert drawn["float"] != drawn["diffusers"]


def test_checkpoints_in_fp8_and_mxfp8_draw_nearly_what_the_float_model_draws(tiny_model, checkpoint, tmp_path):
    octavo("generate", tiny_model, "a red circle", "-o", tmp_path / "float.png", *SMALL)
    for element in ("fp8", "mxfp8"):
        out = checkpoint("--format", "diffusers", "--accuracy", "plain", "--element", element)
        octavo("generate", out, "a red circle", "-o", tmp_path / f"{element}.png", *SMALL)
        pairs = zip(pixels(tmp_path / f"{element}.png"), pixels(tmp_path / "float.png"), strict=True)
        assert max(abs(a - b) for a, b in pairs) < 64


def test_the_seed_decides_and_model_gives_the_place_of_the_model(tiny_model, checkpoints, tmp_path):
    for name, more in (("a", ()), ("b", ("--model", tiny_model)), ("c", ("--seed", 1))):
        octavo("generate", checkpoints["diffusers"], "a ring", "-o", tmp_path / f"{name}.png", *SMALL, *more)
    drawn = {path.stem: pixels(path) for path in tmp_path.glob("*.png")}
    assert drawn["a"] == drawn["b"] != drawn["c"]


def test_a_directory_takes_frames_and_safetensors_latents(tiny_model, tmp_path):
    octavo("generate", tiny_model, "a ring", "-o", tmp_path / "frames", *SMALL)
    assert [path.name for path in (tmp_path / "frames").iterdir()] == ["0000.png"]
    octavo("generate", tiny_model, "a ring", "-o", tmp_path / "frames", "--overwrite", *SMALL)
    octavo("generate", tiny_model, "a ring", "-o", tmp_path / "made.safetensors", *SMALL)
    assert load_file(tmp_path / "made.safetensors")["latents"].shape[0] == 1
    event = json.loads(octavo("generate", tiny_model, "x", "-o", tmp_path / "x.jpg", "--json", *SMALL))
    assert event["made"] == "16 x 16"


def test_the_bundled_integers_draw_what_the_prompt_says(tmp_path):
    octavo("generate", "demo-int8", PROMPT, "-o", tmp_path / "a.png", "--device", "cpu")
    with Image.open(tmp_path / "a.png") as picture:
        assert judge(np.asarray(picture.convert("RGB"))) == parse(PROMPT)


def test_the_bundled_integers_are_small_sound_and_loaded_as_integers():
    assert sum(file.stat().st_size for file in DEMO_INT8.iterdir()) < 4 * 2**20
    pipe: Any = open_pipeline("demo-int8", None, None, dtype=None, device=resolve_device("cpu"))
    assert len(integer_layers(pipe.transformer)) > 50
    assert json.loads(octavo("inspect", "demo-int8", "--json"))["sound"] is True


def test_a_quantized_text_encoder_is_drawn_with(tiny_model, tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("a red circle\na blue ring")
    capture(tiny_model, tmp_path / "c", file, "--component", "text_encoder")
    octavo("calibrate", tmp_path / "c", tmp_path / "q", "--accuracy", "plain")
    pipe: Any = open_pipeline(str(tmp_path / "q"), None, None, dtype=None, device=resolve_device("cpu"))
    assert integer_layers(pipe.text_encoder)
    assert not integer_layers(pipe.transformer)
    octavo("generate", tmp_path / "q", "a red circle", "-o", tmp_path / "a.png", *SMALL)
    octavo("generate", tiny_model, "a red circle", "-o", tmp_path / "b.png", *SMALL)
    assert pixels(tmp_path / "a.png") != pixels(tmp_path / "b.png")
    output = octavo("calibrate", tmp_path / "c", tmp_path / "d", "--format", "ascend,diffusers", code=2)
    assert "--format diffusers only works with models of diffusers, and text_encoder is not one" in output


def test_a_quantized_pipeline_is_one_directory(tiny_model, checkpoints, tmp_path):
    device = resolve_device("cpu")
    pipe: Any = open_pipeline(str(checkpoints["diffusers"]), None, None, dtype=None, device=device)
    pipe.save_pretrained(tmp_path / "pipe")
    assert (tmp_path / "pipe" / "transformer" / WEIGHTS).read_bytes() == (
        checkpoints["diffusers"] / WEIGHTS
    ).read_bytes()
    octavo("generate", tmp_path / "pipe", "a ring", "-o", tmp_path / "a.png", *SMALL)
    octavo("generate", checkpoints["diffusers"], "a ring", "-o", tmp_path / "b.png", *SMALL)
    assert max(abs(a - b) for a, b in zip(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"), strict=True)) <= 2
    assert "for diffusers with octavo" in octavo("inspect", tmp_path / "pipe")
    octavo("inspect", tiny_model, code=3)


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (("-o", "a.gif"), 2, "the ending '.gif' is unknown"),
        (("-o", "no/a.png"), 5, "there is no directory"),
        (("-o", "there.png"), 5, "Use --overwrite"),
        (("-o", "full"), 5, "not empty"),
        (("-o", "a.png", "--frames", 3), 2, "takes no argument num_frames"),
        (("-o", "a.png", "--arg", "strength"), 2, "not of the form NAME=VALUE"),
        (("-o", "a.png", "--component", "transformer"), 2, "--model and --component only work with a checkpoint"),
        (("-o", "a.png", "--device", "npu"), 7, "torch_npu is not installed"),
        (("-o", "a.png", "--height", 17), 4, "the pipeline failed"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(tiny_model, tmp_path, monkeypatch, more, code, words):
    monkeypatch.chdir(tmp_path)
    Path("there.png").write_bytes(b"mine")
    Path("full").mkdir()
    Path("full/mine").touch()
    before = sorted(tmp_path.rglob("*"))
    output = octavo("generate", tiny_model, "a ring", *more, code=code)
    assert len(errors(output)) == 1
    assert words in errors(output)[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_checkpoints_that_do_not_fit_are_refused(checkpoints, tmp_path, tiny_model):
    out = ("-o", tmp_path / "a.png")
    assert "no such model directory" in octavo("generate", tmp_path / "nothing", "x", *out, code=2)
    assert "has no component unet" in octavo(
        "generate", checkpoints["diffusers"], "x", *out, "--component", "unet", code=2
    )
    assert "is in the format of torchao" in octavo(
        "generate", checkpoints["both"] / "torchao", "x", *out, "--model", tiny_model, code=2
    )
    assert "was made from another model" in octavo(
        "generate", checkpoints["ascend"], "x", *out, "--model", "demo", code=4
    )
    bare = Path(shutil.copytree(checkpoints["diffusers"], tmp_path / "bare"))
    for name in ("report.json", MANIFEST):
        (bare / name).unlink()
    assert "Give the model with --model" in octavo("generate", bare, "x", *out, code=2)


def test_a_video_is_not_a_picture(tmp_path):
    frames = [[Image.new("RGB", (4, 2), (shade, 0, 0)) for shade in range(3)]]
    with pytest.raises(Exception, match="3 frames"):
        save(frames, Target(tmp_path / "a.png"), 8)
    assert save(frames, Target(tmp_path / "a"), 8) == "3 frames of 4 x 2"
    assert [pixels(path)[0] for path in sorted((tmp_path / "a").iterdir())] == [0, 1, 2]


@pytest.mark.slow
def test_the_command_is_the_first_to_import_what_it_needs():
    done = subprocess.run([sys.executable, "-c", "import octavo.commands.generate"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_picture_of_a_batch_is_written_or_refused_before_it_is_drawn(tiny_model, tmp_path):
    batch = ("--arg", "num_images_per_prompt=3")
    output = octavo("generate", tiny_model, "a ring", "-o", tmp_path / "a.png", *SMALL, *batch, code=2)
    assert (
        "is one file, and --arg num_images_per_prompt makes 3 pictures or videos. Give a directory" in errors(output)[0]
    )
    assert not list(tmp_path.iterdir())
    output = octavo("generate", tiny_model, "a ring", "-o", tmp_path / "a", *SMALL, *batch)
    assert "3 pictures of 16 x 16" in output
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["0000.png", "0001.png", "0002.png"]
    assert len({pixels(path) for path in (tmp_path / "a").iterdir()}) == 3


def test_several_videos_are_folders_of_frames_that_can_be_written_over(tmp_path):
    videos = [[Image.new("RGB", (4, 2), (10 * video + frame, 0, 0)) for frame in range(2)] for video in range(3)]
    with pytest.raises(Exception, match="made 3 videos"):
        save(videos, Target(tmp_path / "a.mp4"), 8)
    assert save(videos, Target(tmp_path / "a"), 8) == "3 videos of 2 frames of 4 x 2"
    names = [str(path.relative_to(tmp_path)) for path in sorted((tmp_path / "a").rglob("*.png"))]
    assert names == [f"a/{video:04d}/{frame:04d}.png" for video in range(3) for frame in range(2)]
    assert target_of(tmp_path / "a", overwrite=True).path == tmp_path / "a"
    (tmp_path / "a" / "0001" / "mine.txt").touch()
    with pytest.raises(Exception, match="not empty"):
        target_of(tmp_path / "a", overwrite=True)
