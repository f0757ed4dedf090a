"""`octavo inspect` gives correct verdicts on directories that diffusers loads with Octavo or with torchao."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from octavo.calibrate.formats.diffusers.write import write_diffusers
from octavo.calibrate.formats.export import export
from octavo.calibrate.formats.inspect import check, views
from octavo.capture.files import Modes

from ....helpers.commands import octavo
from ....zoo.exported_sd3 import TO_Q, WEIGHTS, reconfigured
from ....zoo.hard_sd3 import calibrated, hard, prompts
from ....zoo.layer_kinds import changed

ALL = ("ascend", "diffusers", "torchao")
CONSUMERS = {"octavo", "MindIE-SD", "diffusers", "torchao"}  # of these formats


@pytest.fixture(scope="module")
def export_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "out"
    model = hard()
    result = calibrated(model, prompts(3, 2), smoothing=True, weights=("gptq",), bias_correction=True)
    return export(result, model, folder, ALL)


@pytest.fixture
def copied(export_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(export_folder, tmp_path / "copied")


def failed(folder: Path) -> list[str]:
    """Returns the negative verdicts for the consumers of ALL."""
    verdicts = [v for v in check(folder) if v.consumer in CONSUMERS and not v.ok and v.subject != "in bfloat16"]
    return [f"{v.consumer} {v.subject}: {v.fact}" for v in verdicts]


def test_all_views_of_one_calibration_are_sound(export_folder):
    assert views(export_folder) == {
        "ascend": export_folder,
        "diffusers": export_folder,
        "torchao": export_folder / "torchao",
    }
    assert failed(export_folder) == []
    report = json.loads(octavo("inspect", export_folder, "--json"))
    assert report["sound"] is True
    assert report["views"] == sorted(ALL)
    assert report["layers"]["diffusers"]["W8A8"] == report["layers"]["torchao"]["Int8Tensor"]
    assert {verdict["consumer"] for verdict in report["verdicts"]} >= CONSUMERS


@pytest.mark.parametrize("activations", ["static", "timestep", "dynamic", "float"])
def test_a_view_alone_is_sound_and_the_others_are_named(tmp_path, activations):
    model = hard()
    result = calibrated(model, prompts(3, 2), activations=activations)
    export(result, model, tmp_path / "out", ("diffusers",))
    assert failed(tmp_path / "out") == [
        "MindIE-SD files: not in this checkpoint. Calibrate with --format ascend",
        "torchao files: not in this checkpoint. Calibrate with --format torchao",
    ]
    assert "for diffusers with octavo" in octavo("inspect", tmp_path / "out")


def test_several_files_are_one_model(tmp_path, export_folder):
    model = hard()
    (tmp_path / "out").mkdir()
    write_diffusers(calibrated(model, prompts(3, 2)).layers, model, tmp_path / "out", Modes(), shard=60_000)
    assert "diffusers" not in " ".join(failed(tmp_path / "out"))
    next(tmp_path.glob("out/*-00002-of-*")).unlink()
    assert any("missing" in line for line in failed(tmp_path / "out"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{TO_Q}.deq"), f"{TO_Q}.deq is missing"),
        (lambda t: t.update({f"{TO_Q}.deq": t[f"{TO_Q}.deq"].half()}), f"{TO_Q}.deq is float16 [32]"),
        (lambda t: t.update({f"{TO_Q}.edges": torch.ones(2)}), f"{TO_Q}.edges has no place in a W8A8 layer"),
        (lambda t: t.update({f"{TO_Q}.bias": torch.ones(3)}), f"{TO_Q}.bias is float32 [3]"),
        (
            lambda t: t.update({f"{TO_Q}.bias": torch.ones(32).to(torch.float8_e5m2)}),
            f"{TO_Q}.bias is float8_e5m2 [32]",
        ),
        (lambda t: t.update({f"{TO_Q}.weight": torch.tensor(1).char()}), f"{TO_Q}.weight has shape []"),
        (lambda t: t[f"{TO_Q}.deq"].mul_(1.1), f"({TO_Q})"),
    ],
)
def test_a_tensor_that_does_not_fit_is_found(copied, change, words):
    for path in copied.glob("quant_model_*"):
        path.unlink()
    changed(copied, change)
    assert words in " ".join(failed(copied))
    octavo("inspect", copied, code=3)


def test_a_config_that_is_not_ours_is_found(copied):
    reconfigured(copied, lambda config: config["quantization_config"].update(format=9))
    assert "has format 9" in " ".join(failed(copied))
    octavo("inspect", copied, code=3)


@pytest.mark.parametrize("name", ["proj_out.bias", f"{TO_Q}._weight_scale"])
def test_a_described_tensor_that_is_missing_is_reported_for_torchao(copied, name):
    changed(copied / "torchao", lambda tensors: tensors.pop(name))
    assert f"torchao tensors: {name} is described but missing" in failed(copied)
    octavo("inspect", copied, code=3)


def test_missing_weights_of_a_view_are_reported(copied):
    (copied / WEIGHTS).unlink()
    assert any("missing" in line for line in failed(copied))
    assert WEIGHTS in octavo("inspect", copied, code=3)
