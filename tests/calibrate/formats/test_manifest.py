"""Verifying an export names each file that differs from its manifest."""

import json
import random
import shutil
import stat
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file, save_file

from octavo.calibrate import Calibrator, QuantConfig
from octavo.calibrate.calibration import calibrate
from octavo.calibrate.formats.export import export
from octavo.calibrate.formats.manifest import MANIFEST, manifest_for, manifests_of, remove_file, verify
from octavo.calibrate.settings import Settings
from octavo.capture.files import write_sealed

from ...helpers.damage import bytes_changed, resealed, sealed_changed
from ...helpers.refusals import error_of, refused
from ...zoo.exported_sd3 import exported, load
from ...zoo.toy import calls, source_of, toy

DESCRIPTION = "quant_model_description_w8a8.json"


def replaced(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


@pytest.fixture(scope="module")
def export_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in three formats, of which torchao has its own folder. Tests must not change it."""
    folder = tmp_path_factory.mktemp("made")
    source = exported(folder / "two")
    formats = ("ascend", "diffusers", "torchao")
    return export(source.result, source.model, folder / "out", formats)


@pytest.fixture
def out(export_folder: Path, tmp_path: Path) -> Path:
    """A copy of `export_folder` that a test may change."""
    return Path(shutil.copytree(export_folder, tmp_path / "out"))


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_fresh_export_is_as_its_manifests_say(out):
    verification = verify(out)
    assert verification.extra == ()
    assert verification.origin is not None
    (manifest,) = verification.manifests
    listed = {(out / name) for name in manifest.files}
    assert listed == {path for path in files(out) if path != out / MANIFEST}
    assert verify(out / "torchao").manifests[0].files.keys() == {path.name for path in (out / "torchao").iterdir()} - {
        MANIFEST
    }
    assert stat.S_IMODE((out / MANIFEST).stat().st_mode) == 0o400


def test_a_folder_that_moves_keeps_its_manifest(out, tmp_path):
    shutil.move(out / "torchao", tmp_path / "elsewhere")
    assert verify(tmp_path / "elsewhere").manifests
    refused(lambda: verify(out), 3, str(out / "torchao"), "missing")


def test_every_change_of_every_file_is_named(out):
    rng = random.Random(0)
    for path in files(out):
        sound = path.read_bytes()
        for name, content in bytes_changed(sound, rng):
            if content != sound:
                replaced(path, content)
                message = refused(partial(verify, out), 3, str(path))
                assert "damaged (" in message or "larger than" in message, name
        replaced(path, sound)
    verify(out)


def test_a_check_without_digests_compares_sizes(out):
    path = out / "config.json"
    content = path.read_bytes()
    replaced(path, content[:-2] + b" \n")
    assert verify(out, digests=False).manifests
    refused(lambda: verify(out), 3, f"{path}: damaged (checksum).")
    replaced(path, content + b"\n")
    refused(lambda: verify(out, digests=False), 3, f"{path}: damaged (has {len(content) + 1} bytes")
    assert verify(out, {DESCRIPTION}).manifests


def test_missing_and_extra_files_are_named(out):
    (out / "notes.txt").write_text("mine")
    (out / "torchao" / "more").mkdir()
    assert verify(out).extra == ("notes.txt", "torchao/more")
    (out / DESCRIPTION).unlink()
    refused(lambda: verify(out), 3, f"{out / DESCRIPTION}: missing", f"{MANIFEST} lists it")


def test_links_in_the_place_of_files_are_followed_as_in_the_cache_of_a_hub(out, tmp_path):
    (tmp_path / "cache").mkdir()
    for path in out.rglob("*"):
        if path.is_file():
            target = tmp_path / "cache" / path.relative_to(out).as_posix().replace("/", "-")
            path.rename(target)
            path.symlink_to(target)
    assert verify(out).manifests
    assert load(out) is not None


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", ""])
def test_a_manifest_names_nothing_outside_its_directory(name, tmp_path):
    files_ = {name: {"bytes": 1, "sha256": "x"}}
    write_sealed(tmp_path / MANIFEST, {"format": 1, "octavo": "1", "files": files_, "model": None}, 0o600)
    refused(lambda: verify(tmp_path), 3, "outside its directory")


def test_a_newer_manifest_says_so(tmp_path):
    write_sealed(tmp_path / MANIFEST, {"format": 2}, 0o600)
    refused(lambda: verify(tmp_path), 3, "has format 2, but this version reads 1. Upgrade Octavo.")


def test_a_manifest_with_other_content_and_the_right_seal_is_read_or_refused(out):
    sound = (out / MANIFEST).read_bytes()
    for name, content in sealed_changed(sound, random.Random(1), 3):
        replaced(out / MANIFEST, content)
        fact = error_of(partial(verify, out), 3)
        assert fact is None or str(out) in fact, name
    replaced(out / MANIFEST, resealed(b"[]"))
    refused(lambda: verify(out), 3, "not an object")


def test_from_pretrained_compares_sizes(out):
    (out / MANIFEST).rename(out / "aside")
    sound = load(out)
    (out / "aside").rename(out / MANIFEST)
    assert torch.equal(load(out).proj_out.weight, sound.proj_out.weight)
    path = out / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    path.unlink()
    save_file(tensors, path, {"format": "pt", "note": "written by another tool"})
    refused(lambda: SD3Transformer2DModel.from_pretrained(out), 3, f"{path}: damaged (")


def test_a_checkpoint_without_a_manifest_is_not_verified(out):
    (out / MANIFEST).unlink()
    assert verify(out).manifests == ()
    assert load(out) is not None


def calibrator(seed: int = 0) -> Calibrator:
    samples = [{"x": call.args[0], **call.kwargs} for call in calls()]
    instance = Calibrator(toy(seed=seed), QuantConfig(act_method=1, quant_mode=1), samples)
    instance.run()
    return instance


def test_exports_beside_each_other_have_a_manifest_each(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for rank in range(2):
        names = f"quant_model_weight_w8a8_{rank}.safetensors", f"quant_model_description_w8a8_{rank}.json"
        calibrator(rank).export_quant_safetensor(tmp_path, *names)
    verification = verify(tmp_path)
    assert [manifest.path.name for manifest in verification.manifests] == [
        manifest_for(f"quant_model_description_w8a8_{rank}") for rank in range(2)
    ]
    assert verification.extra == ()  # other files are the user's
    path = tmp_path / "quant_model_weight_w8a8_1.safetensors"
    replaced(path, path.read_bytes()[:-1] + b"x")
    refused(lambda: verify(tmp_path), 3, f"{path}: damaged (checksum).")
    calibrator(1).export_quant_safetensor(tmp_path, path.name, "quant_model_description_w8a8_1.json")
    assert verify(tmp_path) == verification


def test_an_export_over_a_part_of_another_removes_its_manifest(tmp_path):
    model = toy()
    out = export(calibrate(model, source_of(calls()), Settings(defaults={})), model, tmp_path / "out")
    calibrator(1).export_quant_safetensor(out)
    assert [manifest.path.name for manifest in manifests_of(out)] == [manifest_for("quant_model_description_w8a8")]
    verify(out)


def test_a_file_can_be_removed_from_an_export(out):
    shutil.rmtree(out / "torchao")
    (out / MANIFEST).unlink()
    model = toy()
    out = export(calibrate(model, source_of(calls()), Settings(defaults={})), model, out.parent / "toy")
    remove_file(out, "report.json")
    verification = verify(out)
    assert "report.json" not in verification.manifests[0].files
    assert verification.extra == ()
    assert json.loads((out / DESCRIPTION).read_text())
