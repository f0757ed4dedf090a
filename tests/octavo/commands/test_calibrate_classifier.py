"""Checks `octavo calibrate-cnn` and its old spelling, with pictures and without data, and what they refuse."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification

from octavo.calibrate.formats.ascend.read import load_ascend
from octavo.calibrate.formats.manifest import MANIFEST
from octavo.calibrate.layers.modules import QuantizedConv2d, QuantizedLinear
from octavo.pipelines.digits.data import digits, write_pictures
from octavo.pipelines.digits.train import PREPROCESSING

from ...helpers.commands import errors, octavo
from ...zoo.convolutions import with_statistics

CNN = ("calibrate-cnn",)
OLD = ("calibrate", "--pipeline", "cnn")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes a ResNet with random weights and with batch norms that have statistics."""
    folder = tmp_path_factory.mktemp("resnet")
    torch.manual_seed(0)
    config = ResNetConfig(num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    with_statistics(ResNetForImageClassification(config)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING))
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(digits()[0].pictures[:20], tmp_path_factory.mktemp("pictures"))


def content(folder: Path) -> dict[str, bytes]:
    """Returns the files of a checkpoint without the report, which holds times, and the manifest, which holds the
    report's digest."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name not in ("report.json", MANIFEST)}


def test_pictures_lead_to_a_checkpoint_the_same_twice(model, images, tmp_path):
    output = octavo(*CNN, model, tmp_path / "a", "--images", images)
    assert "7 layers in 8-bit integers, 0 float" in output
    octavo(*OLD, model, tmp_path / "b", "--images", images)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["totals"]["calls"] == 10
    assert len(report["folded"]) == 6
    layers = load_ascend(tmp_path / "a")
    assert {type(layer) for layer in layers.values()} == {QuantizedConv2d, QuantizedLinear}
    assert set(layers) == {row["name"] for row in report["layers"]}


@pytest.mark.slow
def test_no_data_leads_to_a_checkpoint(model, tmp_path):
    output = octavo(*CNN, model, tmp_path / "a", "--input-shape", "1,3,8,8", "--keep-float", "classifier*")
    assert "6 layers in 8-bit integers, 1 float" in output


def test_a_configuration_file_says_the_same(model, images, tmp_path):
    config = tmp_path / "c.toml"
    config.write_text(f'pipeline = "cnn"\nimages = "{images}"\nsamples = 4\n')
    output = octavo("calibrate", model, tmp_path / "a", "--config", config, "--dtype", "float16")
    assert "4 calls" in output
    assert "unknown option 'pipeline'" in octavo(*CNN, model, tmp_path / "b", "--config", config, code=2)
    config.write_text(f'images = "{images}"\nsamples = 4\n')
    octavo(*CNN, model, tmp_path / "b", "--config", config, "--dtype", "float16")
    assert content(tmp_path / "a") == content(tmp_path / "b")


def broken(images: Path, folder: Path) -> Path:
    shutil.copytree(images, folder)
    (folder / "0003.png").write_bytes((images / "0003.png").read_bytes()[:60])
    return folder


REFUSED = [
    (("--images", "{tmp}/none"), "none: no such directory", 2),
    (("--images", "{tmp}/file"), "file: is not a directory", 3),
    (("--images", "{tmp}/empty"), "empty: holds no pictures", 3),
    (("--images", "{tmp}/broken"), "0003.png: not a picture that can be read", 3),
    ((), "needs --images or --input-shape, but neither was given", 2),
    (("--images", "{images}", "--input-shape", "1,3,8,8"), "but both were given", 2),
    (("--input-shape", "1,3,8"), "'1,3,8' is not batch,channels,height,width", 2),
    (("--input-shape", "1,3,0,8"), "'1,3,0,8' is not", 2),
    (("--input-shape", "1,1,8,8"), "input_shape [1, 1, 8, 8]", 4),
    (("--input-shape", "1,1,8,8", "--keep-float", "nope"), "'nope' matches no layer", 2),
    (("--input-shape", "1,3,8,8", "--samples", "3"), "--samples only works with --images", 2),
    (("--images", "{images}", "--keep-float", "nope"), "'nope' matches no layer", 2),
    (("--images", "{images}", "--format", "nope"), "--format: there is no format 'nope'", 2),
    (("--images", "{images}", "--format", "onnx,diffusers"), "--format diffusers only works with denoisers", 2),
]


@pytest.mark.parametrize("spelling", [CNN, OLD], ids=["new", "old"])
@pytest.mark.parametrize(("options", "fact", "code"), REFUSED, ids=lambda value: str(value)[:40])
def test_missing_and_contradicting_inputs_are_refused(model, images, tmp_path, options, fact, code, spelling):
    (tmp_path / "file").write_text("no directory")
    (tmp_path / "empty").mkdir()
    broken(images, tmp_path / "broken")
    words = [option.format(tmp=tmp_path, images=images) for option in options]
    lines = errors(octavo(*spelling, model, tmp_path / "out", *words, code=code))
    assert len(lines) == 1
    assert fact in lines[0]
    assert not (tmp_path / "out").exists()


OTHERS = [
    ("--budget", "40%"), ("--model", "m"), ("--component", "c"), ("--quantize", "q"), ("--memory", "1GiB"),
    ("--allow-incomplete",), ("--allow-revision",), ("--trust-remote-code",),
]  # fmt: skip


@pytest.mark.parametrize("option", OTHERS, ids=lambda option: option[0])
def test_options_of_denoisers_are_refused_in_the_old_spelling_and_unknown_in_the_new(images, tmp_path, option):
    arguments = (tmp_path, tmp_path / "out", "--images", images, *option)
    assert f"{option[0]} does not work with --pipeline cnn." in errors(octavo(*OLD, *arguments, code=2))[0]
    assert f"No such option '{option[0]}'" in errors(octavo(*CNN, *arguments, code=2))[0]


def test_a_classifier_has_no_noise_levels(images, tmp_path):
    arguments = (tmp_path, tmp_path / "out", "--images", images, "--activations", "timestep")
    assert "no noise levels" in errors(octavo(*OLD, *arguments, code=2))[0]
    assert "'timestep' is not one of 'static', 'dynamic'" in errors(octavo(*CNN, *arguments, code=2))[0]


def test_a_size_of_files_is_taken_in_the_old_spelling_though_no_format_splits_them(model, images, tmp_path):
    octavo(*OLD, model, tmp_path / "out", "--images", images, "--max-shard-size", "1GB")


NO_FORM = [
    (
        ("--activations", "dynamic", "--format", "ascend,ascend-onnx"),
        "ascend-onnx: cannot hold layers with dynamic activations",
    ),
    (("--accuracy", "best", "--format", "onnx"), "format onnx: cannot hold layers with dynamic activations"),
    (("--weight-only", "--format", "onnx,ascend-onnx"), "format ascend-onnx: cannot hold weight-only layers"),
]


@pytest.mark.parametrize(("options", "fact"), NO_FORM, ids=lambda value: str(value)[:40])
def test_what_a_format_has_no_form_for_is_refused_before_a_picture_is_read(tmp_path, options, fact):
    lines = errors(octavo(*CNN, tmp_path, tmp_path / "out", "--images", tmp_path, *options, code=2))
    assert len(lines) == 1
    assert fact in lines[0]
    assert "Use --activations static." in lines[0]


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_classifier(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "t5"}')


def not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def bad_preprocessing(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text('{"size": {"width": "wide"}}')


DAMAGES = [without_config, no_classifier, not_json, truncated, bad_preprocessing]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_models_are_refused(model, images, tmp_path, damage):
    shutil.copytree(model, tmp_path / "model")
    damage(tmp_path / "model")
    lines = errors(octavo(*CNN, tmp_path / "model", tmp_path / "out", "--images", images, code=3))
    assert len(lines) == 1
    assert str(tmp_path / "model") in lines[0]


def test_no_such_model_and_pictures_without_the_pipeline(images, tmp_path):
    lines = errors(octavo(*CNN, tmp_path / "none", tmp_path / "out", "--images", images, code=2))
    assert "no such model directory" in lines[0]
    lines = errors(octavo("calibrate", tmp_path, tmp_path / "out", "--images", images, code=2))
    assert "--images only works with octavo calibrate-cnn" in lines[0]


def test_pictures_in_folders_and_of_other_formats_are_found(model, tmp_path):
    for index, name in enumerate(["b/x.jpg", "a/y.bmp", "z.png", "c.txt"]):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new(["RGB", "L", "RGBA", "L"][index], (9 + index, 7), 90).save(
            tmp_path / "images" / name, ["JPEG", "BMP", "PNG", "PNG"][index]
        )
    assert "3 calls" in octavo(*CNN, model, tmp_path / "out", "--images", tmp_path / "images")
