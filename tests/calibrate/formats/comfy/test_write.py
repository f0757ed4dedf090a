"""The format comfy holds the integers of the layers under native names, with both kinds of markers."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from octavo.calibrate.formats.comfy.names import family_of, native_names, together
from octavo.calibrate.formats.comfy.structure import FILE, METADATA
from octavo.calibrate.formats.comfy.write import join
from octavo.calibrate.formats.export import export
from octavo.calibrate.formats.linears import dequantized
from octavo.calibrate.layers.install import quantized
from octavo.calibrate.layers.modules import QuantizedLayer
from octavo.calibrate.plan import Plan
from octavo.calibrate.replay.sqnr import Power
from octavo.calibrate.result import Result

from ....helpers.refusals import refused
from ....zoo.comfy_models import MODELS, eager, integer, integers, model
from ....zoo.hard_sd3 import calibrated, hard, prompts
from ....zoo.layer_kinds import frozen
from ....zoo.toy import toy

TO_Q = "transformer_blocks.0.attn.to_q"
QKV = "joint_blocks.0.x_block.attn.qkv"


def exported(folder: Path, module: nn.Module, layers: Mapping[str, QuantizedLayer], **result: Any) -> Path:
    """Exports `module` with these integer layers in the format comfy."""
    return export(Result(Plan(()), dict(layers), {}, **result), module, folder, ("comfy",))


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors and the layers of `_quantization_metadata` of the file in `folder`."""
    with safe_open(folder / FILE, "pt") as file:
        metadata = json.loads(file.metadata()[METADATA])
        assert metadata["format_version"] == "1.0"
        return {key: file.get_tensor(key) for key in file.keys()}, metadata["layers"]  # noqa: SIM118


def expected(module: nn.Module, layers: Mapping[str, QuantizedLayer]) -> dict[str, Tensor]:
    """Returns the tensors except markers that a file should have, made from the parts of each native tensor."""
    floats, result = module.state_dict(), {}
    for native, row in native_names(floats, family_of(module)).items():
        owner, _, leaf = native.rpartition(".")
        owners = [name.rpartition(".")[0] for name in row.names]
        if leaf == "weight" and owners[0] in layers:
            scales = [layers[name].weight_scale[:, None] for name in owners]
            result[f"{owner}.weight_scale"] = join(scales, row)
            result[native] = join([layers[name].weight.detach() for name in owners], row)
        else:
            result[native] = join([floats[name] for name in row.names], row)
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_the_file_holds_the_integers_with_markers_and_metadata(tmp_path, name, dtype):
    module = model(name, dtype)
    layers = integers(module, 16)
    tensors, metadata = read(exported(tmp_path / "out", module, layers))
    markers = {key: tensors.pop(key) for key in list(tensors) if key.endswith(".comfy_quant")}
    wanted = expected(module, layers)
    assert tensors.keys() == wanted.keys()
    assert all(
        torch.equal(tensor, wanted[key]) and tensor.dtype == wanted[key].dtype for key, tensor in tensors.items()
    )
    assert {key.removesuffix(".comfy_quant") for key in markers} == metadata.keys()
    for key, marker in metadata.items():
        assert json.loads(bytes(markers[f"{key}.comfy_quant"].tolist())) == marker
        rotation = {"convrot": True, "convrot_groupsize": 16} if tensors[f"{key}.weight"].shape[1] % 16 == 0 else {}
        assert marker == {"format": "int8_tensorwise"} | rotation
        assert tensors[f"{key}.weight_scale"].dtype == torch.float32
        assert tensors[f"{key}.weight_scale"].shape == (len(tensors[f"{key}.weight"]), 1)


@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("name", MODELS)
def test_the_consumers_arithmetic_gives_octavos_outputs_in_float32(tmp_path, name, group):
    module = model(name)
    layers = integers(module, group)
    tensors, metadata = read(exported(tmp_path / "out", module, layers))
    for native, row in native_names(module.state_dict(), family_of(module)).items():
        owner = native.removesuffix(".weight")
        if owner not in metadata:
            continue
        members = [layers[name.removesuffix(".weight")] for name in row.names]
        x = torch.randn(3, 5, members[0].in_features)
        parts = (tensors[native], tensors[f"{owner}.weight_scale"], tensors.get(f"{owner}.bias"))
        outputs = torch.cat([layer(x) for layer in members], -1)
        outputs = torch.cat(outputs.chunk(2, -1)[::-1], -1) if row.swapped else outputs
        assert torch.equal(eager(x, *parts, metadata[owner].get("convrot_groupsize")), outputs), owner


def test_in_bfloat16_the_consumer_rounds_more_than_octavo():
    linear = nn.Linear(256, 64).to(torch.bfloat16).requires_grad_(False)
    layer, x = integer(linear, 256), torch.randn(50, 256).to(torch.bfloat16)
    theirs, ours = Power(), Power()
    exact = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double())
    theirs.add(exact, eager(x, layer.weight, layer.weight_scale, layer.bias, 256).double())
    ours.add(exact, layer(x).double())
    assert 0.0 < (ours.sqnr or 0.0) - (theirs.sqnr or 0.0) < 1.0


@pytest.mark.parametrize(
    "change",
    [
        lambda layers, module: layers.pop(TO_Q),
        lambda layers, module: layers.update({TO_Q: integer(module.get_submodule(TO_Q))}),
    ],
    ids=["one layer float", "one layer not rotated"],
)
def test_a_matrix_of_unlike_layers_is_float_and_says_so(tmp_path, caplog, change):
    module = model("sd3")
    layers = integers(module, 16)
    change(layers, module)
    with caplog.at_level(logging.WARNING):
        tensors, metadata = read(exported(tmp_path / "out", module, layers))
    assert QKV not in metadata
    assert f"{QKV}.comfy_quant" not in tensors
    assert f"{QKV}.weight_scale" not in tensors
    assert sum(QKV in record.getMessage() for record in caplog.records) == 1
    names = next(group for group in together(module) if TO_Q in group)
    rows = [dequantized(layers[name]) if name in layers else module.get_submodule(name).weight for name in names]
    assert torch.equal(tensors[f"{QKV}.weight"], torch.cat(rows))
    assert torch.allclose(
        tensors[f"{QKV}.weight"], torch.cat([module.get_submodule(n).weight for n in names]), atol=0.02
    )


def test_a_model_with_its_integer_layers_installed_gives_the_same_file(tmp_path):
    module = model("flux")
    layers = integers(module, 16)
    exported(tmp_path / "float", module, layers)
    with quantized(module, layers):
        exported(tmp_path / "installed", module, layers)
    assert (tmp_path / "float" / FILE).read_bytes() == (tmp_path / "installed" / FILE).read_bytes()


def test_folded_parameters_are_written(tmp_path):
    module = model("qwen-image")
    new = torch.full_like(module.txt_norm.weight, 2.0)
    exported_folder = exported(tmp_path / "out", module, {}, parameters={"txt_norm.weight": lambda: new})
    assert torch.equal(read(exported_folder)[0]["txt_norm.weight"], new)


def test_a_calibration_with_smoothing_is_folded_or_refused(tmp_path):
    module = hard()
    result = calibrated(module, prompts(3, 2), activations="dynamic", rotation="auto")
    tensors, metadata = read(export(result, module, tmp_path / "out", ("comfy",)))
    assert metadata
    assert not [name for name in tensors if "mul_scale" in name]
    smoothed = calibrated(module, prompts(3, 2), activations="dynamic", smoothing=True, fold=False)
    if any(layer.mul_scale is not None for layer in smoothed.layers.values()):
        refused(lambda: export(smoothed, module, tmp_path / "no", ("comfy",)), 2, "Multiply")


def test_a_flag_of_the_config_becomes_an_empty_tensor(tmp_path):
    module = model("qwen-image")
    assert "__index_timestep_zero__" not in read(exported(tmp_path / "plain", module, {}))[0]
    module.register_to_config(zero_cond_t=True)
    assert read(exported(tmp_path / "edit", module, {}))[0]["__index_timestep_zero__"].numel() == 0


def test_what_the_format_cannot_hold_is_refused_in_one_line(tmp_path):
    module = model("sd3")
    linear, conv = module.get_submodule(TO_Q), module.get_submodule("pos_embed.proj")
    refused(lambda: exported(tmp_path / "a", module, {TO_Q: frozen(linear, "W8A8")}), 2, TO_Q, "scheme is W8A8")
    refused(
        lambda: exported(tmp_path / "b", module, {"pos_embed.proj": frozen(conv, "W8A8_DYNAMIC")}), 2, "convolution"
    )
    refused(lambda: exported(tmp_path / "c", toy(), {}), 2, "Toy", "Flux.1", "--format diffusers")
    module.proj_out.bias[0] = torch.nan
    refused(lambda: exported(tmp_path / "d", module, {}), 6, "proj_out.bias")
