"""A changed or damaged directory for diffusers is refused: diffusers never loads it silently as another model."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import nn

from octavo.calibrate.formats.diffusers.layers import structure_of
from octavo.calibrate.formats.diffusers.structure import Structure
from octavo.calibrate.formats.export import export
from octavo.calibrate.plan import Plan
from octavo.calibrate.result import Result
from octavo.capture.errors import OctavoError
from octavo.capture.tensors import Planned, write_tensors

from ....helpers.refusals import refused
from ....zoo.exported_sd3 import TO_Q, WEIGHTS, Exported, exported, load, reconfigured
from ....zoo.layer_kinds import changed, frozen, layers_of
from ....zoo.toy import toy

ROOT = Path(__file__).parents[4]


@pytest.fixture
def out(tmp_path: Path) -> Exported:
    """A checkpoint that holds files for diffusers only, so that tests can change its weights."""
    checkpoint = exported(tmp_path / "out")
    for path in checkpoint.folder.glob("quant_model_*"):
        path.unlink()
    return checkpoint


def refused_load(folder: Path, code: int, words: str, kind: Any = SD3Transformer2DModel, **options: Any) -> None:
    refused(lambda: kind.from_pretrained(folder, **options), code, words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{TO_Q}.deq"), f"{TO_Q}.deq: not in the checkpoint"),
        (lambda t: t.pop("proj_out.bias"), "proj_out.bias: not in the checkpoint, so its values"),
        (lambda t: t.update(more=torch.ones(1)), "more: has no place in SD3Transformer2DModel"),
        (lambda t: t.update({f"{TO_Q}.weight": t[f"{TO_Q}.weight"].float()}), "is float32, but the model needs int8"),
        (lambda t: t.update({f"{TO_Q}.deq": t[f"{TO_Q}.deq"].half()}), "is float16, but the model needs float32"),
        (
            lambda t: t.update({"proj_out.bias": t["proj_out.bias"].to(torch.int8)}),
            "is int8, but the model needs float32",
        ),
        (
            lambda t: t.update({f"{TO_Q}.deq": t[f"{TO_Q}.deq"][1:].clone()}),
            "has shape [31] in the checkpoint and [32] in the model",
        ),
    ],
)  # fmt: skip
def test_a_tensor_that_does_not_fit_is_named(out, change, words):
    changed(out.folder, change)
    refused_load(out.folder, 4, words)


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"format": 2}, 3, "has format 2, but this version reads 1. Upgrade Octavo."),
        ({"dtype": "int4"}, 3, "not a config that Octavo writes"),
        ({"schemes": {}}, 3, "names no layer"),
        ({"schemes": {"W4A4": [TO_Q]}}, 3, "unknown scheme W4A4"),
        ({"schemes": {"W8A8": ["nothing"]}}, 4, "no layer nothing, which quantization_config names"),
        ({"schemes": {"W8A8": ["pos_embed"]}}, 4, "is a PatchEmbed in this model"),
        ({"backend": "abacus"}, 2, "backend: 'abacus' is unknown"),
    ],
)
def test_a_config_that_is_not_ours_is_refused(out, change, code, words):
    reconfigured(out.folder, lambda config: config["quantization_config"].update(change))
    refused_load(out.folder, code, words)


def test_a_layer_that_the_config_forgets_does_not_become_float(out):
    reconfigured(out.folder, lambda config: config["quantization_config"]["schemes"]["W8A8"].remove(TO_Q))
    refused_load(out.folder, 4, f"{TO_Q}.")


def test_a_backend_can_be_asked_for_in_the_config(out):
    reconfigured(out.folder, lambda config: config["quantization_config"].update(backend="reference"))
    loaded = load(out.folder)
    assert loaded.get_submodule(TO_Q).backend == "reference"
    assert loaded.hf_quantizer.quantization_config.to_dict()["backend"] == "reference"


def test_another_class_and_a_disk_are_refused(out):
    refused_load(out.folder, 4, "load the checkpoint with the class that its config.json names", FluxTransformer2DModel)
    refused_load(out.folder, 2, "cannot be offloaded to disk", device_map={"": "disk"}, offload_folder=out.folder)


def test_truncated_weights_are_refused(out):
    path = out.folder / WEIGHTS
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-4])
    with pytest.raises((OSError, OctavoError)):
        load(out.folder)


def test_quantizing_while_loading_is_refused(out):
    config = load(out.folder).hf_quantizer.quantization_config
    out.model.save_pretrained(out.folder / "float")
    with pytest.raises(ValueError, match="pre-quantized"):
        SD3Transformer2DModel.from_pretrained(out.folder / "float", quantization_config=config)


@pytest.mark.slow
def test_diffusers_knows_the_format_only_once_octavo_is_imported(out):
    code = """import sys
from diffusers import SD3Transformer2DModel as Model
try:
    Model.from_pretrained(sys.argv[1])
except ValueError as error:
    print(error)
import octavo
print(type(Model.from_pretrained(sys.argv[1])).__name__)"""
    done = subprocess.run(
        [sys.executable, "-c", code, out.folder], capture_output=True, text=True, cwd=ROOT, check=True
    )
    first, *_, last = done.stdout.strip().split("\n")
    assert "Unknown quantization type, got octavo" in first
    assert last == "SD3Transformer2DModel"


def test_the_config_describes_all_quantized_layers(out):
    config = json.loads((out.folder / "config.json").read_text())
    read = Structure.read(config["quantization_config"])
    assert read == structure_of(out.result.layers)
    assert read.as_dict() == config["quantization_config"]
    assert "_name_or_path" not in config


def test_a_model_that_is_not_from_diffusers_is_refused(tmp_path):
    model = toy().requires_grad_(False)
    layers = layers_of(model, {"proj_out": "W8A8"})
    for name in ("diffusers", "torchao"):
        refused(
            partial(export, Result(Plan(()), layers, {}, axes={"proj_out": 3}), model, tmp_path / "out", (name,)),
            2,
            "Toy is not a diffusers model",
        )
        assert not (tmp_path / "out").exists()


def test_a_value_that_is_not_finite_is_not_written(out, tmp_path):
    layers = {TO_Q: frozen(out.model.get_submodule(TO_Q), "W8A8")}
    layers[TO_Q].weight_scale[0] = float("nan")
    refused(lambda: export(Result(Plan(()), layers, {}), out.model, tmp_path / "bad", ("diffusers",)), 6, "not finite")
    assert not (tmp_path / "bad").exists()


def test_a_cast_of_a_part_leaves_scales_as_they_are():
    linear = nn.Linear(8, 4).requires_grad_(False)
    layer = frozen(linear, "W8A8", multiplier=torch.ones(8))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.half()
    for name, value in layer.state_dict().items():
        assert value.dtype == (torch.float16 if name in ("bias", "mul_scale") else before[name].dtype)
        assert name in ("bias", "mul_scale") or torch.equal(value, before[name])


def test_files_are_those_of_safetensors_to_the_byte(tmp_path):
    from safetensors.torch import save_file

    kinds = (
        torch.int8,
        torch.int32,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.bool,
        torch.uint8,
    )
    tensors = {f"{index}.{kind}": torch.ones(index + 1, 3).to(kind) for index, kind in enumerate(kinds)}
    tensors["scalar"] = torch.tensor(0.5)
    write_tensors(tmp_path / "ours", {name: Planned.of(value) for name, value in tensors.items()}, {}, 0o600)
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
