"""`octavo inspect` names each fault of an int8 file that ComfyUI passes over, in files of any program."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from octavo.calibrate.formats.comfy.check import check
from octavo.calibrate.formats.comfy.structure import FILE, METADATA
from octavo.calibrate.formats.export import export
from octavo.calibrate.formats.inspect import views
from octavo.calibrate.formats.manifest import MANIFEST
from octavo.calibrate.plan import Plan
from octavo.calibrate.result import Result

from ....helpers.commands import octavo
from ....zoo.comfy_models import MODELS, integers, model
from ....zoo.hard_sd3 import calibrated, hard, prompts

QKV = "joint_blocks.0.x_block.attn.qkv"
FC1 = "joint_blocks.0.x_block.mlp.fc1"
Tensors, Layers = dict[str, Tensor], dict[str, Any]
Change = Callable[[Tensors, Layers], object]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    module = model("sd3")
    result = Result(Plan(()), integers(module, 16), {})
    return export(result, module, tmp_path_factory.mktemp("comfy") / "out", ("comfy",))


def failed(path: Path, consumer: str = "ComfyUI") -> list[str]:
    return [f"{v.subject}: {v.fact}" for v in check(path) if not v.ok and v.consumer == consumer]


def foreign(written: Path, target: Path, change: Change, metadata: bool = False) -> Path:
    """Writes a changed copy of the file as another program would, with metadata only where `metadata` is True."""
    with safe_open(written / FILE, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        layers = json.loads(file.metadata()[METADATA])["layers"]
    change(tensors, layers)
    told = {METADATA: json.dumps({"format_version": "1.0", "layers": layers})} if metadata else None
    save_file(tensors, target, told)
    return target


def marked(layer: str, **marker: Any) -> Change:
    """Returns a change that gives `layer` another marker."""
    data = torch.tensor(list(json.dumps(marker).encode()), dtype=torch.uint8)
    return lambda tensors, layers: tensors.update({f"{layer}.comfy_quant": data})


def test_a_file_of_octavo_is_sound(written):
    assert views(written) == {"comfy": written}
    assert failed(written) == []
    assert failed(written, "stable-diffusion.cpp") == []
    assert "not those of Stable Diffusion 3" in failed(written, "SGLang")[0]


def test_a_calibration_is_inspected(tmp_path):
    module = hard()
    result = calibrated(module, prompts(3, 2), activations="dynamic", rotation="16")
    folder = export(result, module, tmp_path / "out", ("comfy",))
    report = json.loads(octavo("inspect", folder, "--json"))
    assert report["sound"] is True
    assert report["views"] == ["comfy"]
    assert report["layers"]["comfy"]["int8_tensorwise"] > 5
    assert FILE not in report["extra"]


@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_recognized_by_its_native_names(tmp_path, name):
    module = model(name)
    folder = export(Result(Plan(()), integers(module), {}), module, tmp_path / "out", ("comfy",))
    assert failed(folder) == []
    names = [verdict.fact for verdict in check(folder) if verdict.subject == "names"]
    assert names[0].startswith("native names of ")


FAULTS: dict[str, tuple[Change, str, bool]] = {
    "no marker": (lambda tensors, layers: tensors.pop(f"{QKV}.comfy_quant"), "markers: .* without a marker", False),
    "a marker that is no JSON": (
        lambda tensors, layers: tensors.update({f"{QKV}.comfy_quant": torch.zeros(3, dtype=torch.uint8)}),
        "markers: .* is not a JSON object",
        False,
    ),
    "a marker of floats": (
        lambda tensors, layers: tensors.update({f"{QKV}.comfy_quant": torch.zeros(3)}), "is not a JSON object", False
    ),
    "another format": (marked(QKV, format="int8_blockwise"), "markers: .*does not know", False),
    "no weight": (lambda tensors, layers: tensors.pop(f"{QKV}.weight"), "markers: .*but no weight", False),
    "a float weight": (
        lambda tensors, layers: tensors.update({f"{QKV}.weight": tensors[f"{QKV}.weight"].float()}),
        "markers: .*cuts it to whole numbers",
        False,
    ),
    "a convolution": (
        lambda tensors, layers: tensors.update({f"{QKV}.weight": tensors[f"{QKV}.weight"][..., None]}),
        "markers: .*no matrix",
        False,
    ),
    "rotation lost in the metadata": (
        lambda tensors, layers: layers[QKV].pop("convrot"), "metadata: .*not rotated in _quantization", True
    ),
    "rotation lost in the marker": (marked(QKV, format="int8_tensorwise"), "but .*not rotated in its marker", True),
    "no scale": (lambda tensors, layers: tensors.pop(f"{QKV}.weight_scale"), "scales: .*is missing", False),
    "a scale in bfloat16": (
        lambda tensors, layers: tensors.update({f"{QKV}.weight_scale": tensors[f"{QKV}.weight_scale"].bfloat16()}),
        "scales: .*is bfloat16, not float32",
        False,
    ),
    "a scale of another shape": (
        lambda tensors, layers: tensors.update({f"{QKV}.weight_scale": tensors[f"{QKV}.weight_scale"][1:]}),
        "scales: .*has shape",
        False,
    ),
    "a scale that is not a number": (
        lambda tensors, layers: tensors[f"{QKV}.weight_scale"].__setitem__(0, torch.nan), "scales: .*finite", False
    ),
    "groups that do not divide": (
        marked(QKV, format="int8_tensorwise", convrot=True), "rotations: .*not a multiple of the 256", False
    ),
    "groups of another size": (
        marked(QKV, format="int8_tensorwise", convrot=True, convrot_groupsize=8), "not by a power of four", False
    ),
    "groups in words": (
        marked(QKV, format="int8_tensorwise", convrot=True, convrot_groupsize="x"), "not by a power of four", False
    ),
    "groups without rotation": (
        marked(QKV, format="int8_tensorwise", convrot_groupsize=16), "rotations: .*without convrot", False
    ),
    "a smoothing multiplier": (
        lambda tensors, layers: tensors.update({f"{FC1}.pre_quant_scale": torch.ones(32)}),
        "left out: .*silently dropped",
        False,
    ),
    "a static scale": (
        lambda tensors, layers: tensors.update({f"{FC1}.input_scale": torch.ones(())}), "silently dropped", False
    ),
    "a key that nothing reads": (marked(QKV, format="int8_tensorwise", quarot=True), "keys: .*'quarot'", False),
    "names of diffusers": (
        lambda tensors, layers: tensors.update({"pos_embed.pos_embed": tensors.pop("pos_embed")}),
        "names: .*with the names of diffusers",
        False,
    ),
    "no integers": (
        lambda tensors, layers: [tensors.pop(name) for name in list(tensors) if not name.endswith(".bias")],
        "layers: has no int8 layers",
        False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_a_negative_verdict(tmp_path, written, fault):
    change, words, metadata = FAULTS[fault]
    found = failed(foreign(written, tmp_path / "model.safetensors", change, metadata))
    assert [line for line in found if re.search(words, line)], found
    assert all("\n" not in line for line in found)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, layers: None,
        lambda tensors, layers: [tensors.update({name: scale[:, 0].contiguous()}) for name, scale in scales(tensors)],
        lambda tensors, layers: [tensors.update({f"net.{n}": tensors.pop(n)}) for n in list(tensors)],
        marked(QKV, format="int8_tensorwise", params={"convrot": True, "convrot_groupsize": 16}),
        marked(QKV, format="int8_tensorwise", per_row=True, full_precision_matrix_mult=True),
        lambda tensors, layers: tensors.update({"other.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)}),
    ],
    ids=["as it is", "flat scales", "with a prefix", "nested", "known keys", "fp8 beside it"],
)
def test_what_comfyui_loads_is_sound(tmp_path, written, change):
    assert failed(foreign(written, tmp_path / "model.safetensors", change)) == []


def scales(tensors: Tensors) -> list[tuple[str, Tensor]]:
    return [(name, tensor) for name, tensor in tensors.items() if name.endswith(".weight_scale")]


def test_metadata_replace_lost_markers_for_comfyui_but_not_for_others(tmp_path, written):
    path = foreign(written, tmp_path / "a.safetensors", lambda tensors, layers: tensors.pop(f"{QKV}.comfy_quant"), True)
    assert failed(path) == []
    assert QKV in failed(path, "stable-diffusion.cpp")[0]


def test_sglang_needs_rotated_layers(tmp_path, written):
    path = foreign(written, tmp_path / "a.safetensors", marked(QKV, format="int8_tensorwise"))
    assert "not rotated" in failed(path, "SGLang")[0]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"layers": []}', '{"layers": {"a": 1}}', "[" * 5000])
def test_metadata_that_cannot_be_read_are_a_negative_verdict(tmp_path, written, text):
    with safe_open(written / FILE, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, tmp_path / "a.safetensors", {METADATA: text})
    assert any(METADATA in line for line in failed(tmp_path / "a.safetensors"))


def test_damage_is_a_negative_verdict(tmp_path, written):
    copy = Path(shutil.copytree(written, tmp_path / "copy"))
    (copy / MANIFEST).unlink()
    data = (copy / FILE).read_bytes()
    (copy / FILE).unlink()
    for part in (b"", data[:4], data[:200], data[:-10], b"\xff" * 64):
        (copy / FILE).write_bytes(part)
        assert len(failed(copy)) == 1
    assert failed(tmp_path)[0].startswith("files: ")
    assert failed(tmp_path / "missing.safetensors")[0].startswith("files: ")


def test_a_single_file_of_another_program_is_inspected(tmp_path, written):
    path = foreign(written, tmp_path / "model.safetensors", lambda tensors, layers: None)
    text = octavo("inspect", path)
    assert "Stable Diffusion 3 and 3.5 for ComfyUI" in text
    assert "native names" in text
    assert json.loads(octavo("inspect", path, "--json"))["sound"] is True
    bad = foreign(written, tmp_path / "bad.safetensors", FAULTS["no marker"][0])
    assert json.loads(octavo("inspect", bad, "--json", code=3))["sound"] is False
    assert views(tmp_path) == {"comfy": tmp_path}
