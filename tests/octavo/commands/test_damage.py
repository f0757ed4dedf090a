"""Damaged checkpoints: nothing damaged is called sound, drawn or compared with, and every refusal is one line."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from octavo.calibrate.formats.manifest import MANIFEST
from octavo.calibrate.report_file import read_report

from ...helpers.commands import errors, octavo
from ...helpers.damage import flipped, json_changed
from ...helpers.refusals import error_of

SMALL = ("--steps", 1, "--height", 16, "--width", 16, "--device", "cpu")
FORMATS = ("ascend", "diffusers", "both")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def made(checkpoint: Callable[..., Path]) -> dict[str, Path]:
    """Checkpoints of one capture: `ascend`, `diffusers` and `both`. Read only."""
    said = zip(FORMATS, ("ascend", "diffusers", "ascend,diffusers"), strict=True)
    return {name: checkpoint("--format", formats, "--accuracy", "plain") for name, formats in said}


@pytest.fixture
def out(made: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the checkpoint in both formats."""
    return Path(shutil.copytree(made["both"], tmp_path / "out"))


def replaced(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)
    path.chmod(0o400)


def commands(model: Path, out: Path) -> list[tuple[object, ...]]:
    """The commands that read the checkpoint `out`, and would write to files beside it."""
    return [
        ("inspect", out),
        ("generate", out, "a ring", "-o", out.parent / "a.png", *SMALL),
        ("compare", model, out, "-o", out.parent / "a.html", "--limit", 1, *SMALL),
    ]


def test_a_flipped_bit_is_found_before_anything_is_computed(tiny_model, out):
    rng = random.Random(0)
    files = sorted(path for path in out.iterdir() if path.is_file())
    for path in files * 3:
        sound = path.read_bytes()
        replaced(path, flipped(sound, rng.randrange(8 * len(sound))))
        for command in commands(tiny_model, out):
            (line,) = errors(octavo(*command, code=3))
            assert line.startswith(f"Error: {path}: damaged (checksum)"), line
        replaced(path, sound)
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]
    assert f"{len(files) - 1} identical to what octavo" in octavo("inspect", out)


def test_missing_files_are_named_and_extra_ones_too(tiny_model, out):
    (out / "notes.txt").write_text("mine")
    for command in commands(tiny_model, out):
        assert f"Warning: {out / 'notes.txt'}: not in the manifest" in octavo(*command)
        (out.parent / "a.png").unlink(missing_ok=True)
        (out.parent / "a.html").unlink(missing_ok=True)
    (out / WEIGHTS).unlink()
    for command in commands(tiny_model, out):
        assert f"{out / WEIGHTS}: missing" in errors(octavo(*command, code=3))[0]


def test_without_a_manifest_nothing_is_verified_and_all_works(tiny_model, out):
    (out / MANIFEST).unlink()
    for command in commands(tiny_model, out):
        assert "not verifiable: no manifest" in octavo(*command)


@pytest.mark.parametrize("name", FORMATS)
def test_one_other_value_of_the_float_weights_is_another_model(tiny_model, made, name, tmp_path):
    other = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (file,) = (other / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    tensors["transformer_blocks.1.ff.net.2.weight"][0, 0] += 1e-3
    save_file(tensors, file, {"format": "pt"})
    for command in (
        ("generate", made[name], "a ring", "-o", tmp_path / "a.png", "--model", other, *SMALL),
        ("compare", other, made[name], "-o", tmp_path / "a.html", *SMALL),
    ):
        (line,) = errors(octavo(*command, code=4))
        assert line.startswith(f"Error: {made[name]}: was made from other weights of this model (fingerprint ")
    for dtype in ("bfloat16", "float16"):
        target = tmp_path / f"{dtype}.png"
        octavo("generate", made[name], "a ring", "-o", target, "--dtype", dtype, *SMALL)


def test_values_that_are_not_finite_are_not_drawn(tiny_model, made, tmp_path):
    out = Path(shutil.copytree(made["diffusers"], tmp_path / "out"))
    (out / MANIFEST).unlink()
    tensors = load_file(out / WEIGHTS)
    tensors["proj_out.bias"].fill_(3e38)
    (out / WEIGHTS).unlink()
    save_file(tensors, out / WEIGHTS, {"format": "pt"})
    for command in commands(tiny_model, out)[1:]:
        assert "not finite" in errors(octavo(*command, code=6))[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_damaged_report_is_a_damaged_file(out):
    sound = (out / "report.json").read_bytes()
    (out / MANIFEST).unlink()
    refused = 0
    for _, content in json_changed(sound, random.Random(2), 4):
        replaced(out / "report.json", content)
        refused += error_of(lambda: read_report(out), 3) is not None
    assert refused > 50
    replaced(out / "report.json", b'{"layers": [], "totals": {}}')
    assert "has no quantized" in errors(octavo("inspect", out, code=3))[0]


@pytest.mark.parametrize("count", [10**7, 2**64, 1e300])
def test_a_config_that_claims_more_layers_than_the_file_holds(tiny_model, made, count, tmp_path):
    out = Path(shutil.copytree(made["diffusers"], tmp_path / "out"))
    (out / MANIFEST).unlink()
    config: dict[str, Any] = json.loads((out / "config.json").read_text())
    replaced(out / "config.json", json.dumps(config | {"num_layers": count}).encode())
    for command in commands(tiny_model, out):
        assert "num_layers is 1" in octavo(*command, code=3)


def test_a_model_that_claims_more_layers_than_the_file_holds(tiny_model, tmp_path):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    path = model / "transformer" / "config.json"
    replaced(path, json.dumps(json.loads(path.read_text()) | {"num_layers": 10**7}).encode())
    said = octavo("generate", model, "a ring", "-o", tmp_path / "a.png", *SMALL, code=3)
    assert errors(said)[0].startswith(f"Error: {path}: num_layers is 10000000")


@pytest.mark.parametrize("change", ["lost", "broken", "without its method"])
def test_a_checkpoint_of_two_formats_does_not_become_the_other_one(tiny_model, out, change):
    (out / MANIFEST).unlink()
    path = out / "config.json"
    config = json.loads(path.read_text())
    path.unlink()
    if change != "lost":
        del config["quantization_config"]
        path.write_text("{" if change == "broken" else json.dumps(config))
    for command in commands(tiny_model, out):
        assert str(path) in octavo(*command, code=3)


def test_a_file_of_a_tebibyte_is_refused_at_once(tiny_model, out):
    (out / MANIFEST).unlink()
    for name in (WEIGHTS, "report.json", "config.json"):
        sound = (out / name).read_bytes()
        replaced(out / name, sound)
        with (out / name).open("r+b") as file:
            file.truncate(1 << 40)
        for command in commands(tiny_model, out):
            assert str(out / name) in octavo(*command, code=3)
        replaced(out / name, sound)


def test_a_tensor_larger_than_memory_is_refused_before_it_is_read(tmp_path):
    from octavo.capture.arrays import read_header
    from octavo.capture.tensors import read_tensor

    header = json.dumps({"a": {"dtype": "I8", "shape": [1 << 40], "data_offsets": [0, 1 << 40]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with path.open("r+b") as file:
        file.truncate(8 + len(header) + (1 << 40))
    stored = read_header(path)[0]["a"]
    assert stored.dtype == "int8"
    assert "more than this machine" in str(error_of(lambda: read_tensor(path, stored), 3))
