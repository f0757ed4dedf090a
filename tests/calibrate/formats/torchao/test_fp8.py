"""The format torchao in FP8: the layout of torchao 0.18's Float8Tensor, and what `octavo inspect` finds in it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from octavo.calibrate.formats.export import export
from octavo.calibrate.formats.inspect import check as inspected
from octavo.calibrate.formats.inspect import sound, views
from octavo.calibrate.formats.torchao.check import check
from octavo.calibrate.formats.torchao.format import FORMATS as TORCHAO
from octavo.calibrate.formats.torchao.format import describe
from octavo.calibrate.layers.transforms import Multiply
from octavo.calibrate.plan import Plan
from octavo.calibrate.result import Result

from ....helpers.refusals import refused
from ....zoo.fp8_layers import fp8_layer, fp8_layers
from ....zoo.pipelines import sd3

WEIGHTS = "diffusion_pytorch_model.safetensors"
TO_Q = "transformer_blocks.0.attn.to_q"
SCHEMES = ("W8A8_FP8_DYNAMIC", "W8A16_FP8")
Described = dict[str, Any]
Change = Callable[[dict[str, Tensor], Described], object]


def exported(folder: Path, scheme: str) -> Path:
    torch.manual_seed(0)
    model = sd3()[0].transformer.requires_grad_(False)
    layers = fp8_layers(model, scheme, keep=("proj_out",))
    return export(Result(Plan(()), layers, {}), model, folder, ("torchao",))


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(folder / WEIGHTS, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_scales_and_their_description_are_those_of_a_float8_tensor(tmp_path, scheme):
    folder = exported(tmp_path / "out", scheme)
    torch.manual_seed(0)
    model = sd3()[0].transformer.requires_grad_(False)
    layers = fp8_layers(model, scheme, keep=("proj_out",))
    tensors, metadata = read(folder)
    assert sorted(json.loads(metadata["tensor_names"])) == sorted(model.state_dict())
    for name, layer in layers.items():
        assert torch.equal(tensors[f"{name}._weight_qdata"], layer.weight)
        assert torch.equal(tensors[f"{name}._weight_scale"], layer.weight_scale[:, None])
        kind = json.loads(metadata[f"{name}.weight"])
        assert (kind["_type"], kind["_tensor_data_names"]) == ("Float8Tensor", ["qdata", "scale"])
        assert kind["_data"]["block_size"] == [1, layer.in_features]
        inputs = kind["_data"]["act_quant_kwargs"]
        assert (inputs is None) == (scheme == "W8A16_FP8")
        assert inputs is None or inputs["_data"]["granularity"]["_type"] == "PerRow"
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_type"]["default"]["_type"] == "Float8DynamicActivationFloat8WeightConfig"
    assert all(verdict.ok for verdict in check(folder))
    assert describe(folder).schemes == {"Float8Tensor": len(layers)}


def test_a_multiplier_is_refused(tmp_path):
    model = sd3()[0].transformer.requires_grad_(False)
    layer = fp8_layer(model.get_submodule(TO_Q), "W8A8_FP8_DYNAMIC")
    layer.mul_scale = Multiply(torch.ones(layer.in_features)).tensors["mul_scale"]
    refused(lambda: export(Result(Plan(()), {TO_Q: layer}, {}), model, tmp_path / "out", ("torchao",)), 2, "Multiply")


def changed(folder: Path, change: Change) -> Path:
    """Changes the tensors, and the description of the weight of TO_Q."""
    tensors, metadata = read(folder)
    described = json.loads(metadata[f"{TO_Q}.weight"])
    change(tensors, described)
    (folder / WEIGHTS).unlink()
    save_file(tensors, folder / WEIGHTS, metadata | {f"{TO_Q}.weight": json.dumps(described)})
    return folder


def replaced(part: str, change: Callable[[Tensor], Tensor]) -> Change:
    key = f"{TO_Q}._weight_{part}"
    return lambda tensors, described: tensors.update({key: change(tensors[key]).contiguous()})


def data(**values: Any) -> Change:
    return lambda tensors, described: described["_data"].update(values)


def nan_code(tensor: Tensor) -> Tensor:
    bits = tensor.view(torch.uint8).clone()
    bits[-1, -1] = 0x7F
    return bits.view(tensor.dtype)


FAULTS: dict[str, tuple[Change, str]] = {
    "a missing scale": (lambda tensors, described: tensors.pop(f"{TO_Q}._weight_scale"), "described but missing"),
    "codes in another dtype": (replaced("qdata", lambda t: t.to(torch.float8_e5m2)), "not a float8_e4m3fn matrix"),
    "a code that is NaN": (replaced("qdata", nan_code), "codes that are NaN"),
    "a flat scale": (replaced("scale", lambda t: t.flatten()), "does not fit block_size"),
    "a scale in bfloat16": (replaced("scale", lambda t: t.bfloat16()), "does not fit block_size"),
    "a scale of zero": (replaced("scale", lambda t: t * 0), "not positive and finite"),
    "blocks of another size": (data(block_size=[1, 8]), "does not fit block_size"),
    "no config of the product": (data(mm_config=None), "without mm_config"),
    "no data": (lambda tensors, described: described.update(_data=None), "not described by"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_a_negative_verdict(tmp_path, fault):
    change, words = FAULTS[fault]
    verdicts = check(changed(exported(tmp_path / "out", "W8A8_FP8_DYNAMIC"), change))
    found = [verdict.fact for verdict in verdicts if not verdict.ok]
    assert len(found) == 1, found
    assert words in found[0]
    assert TO_Q in found[0]
    assert not sound(verdicts, {"torchao"})


def test_a_scale_for_the_whole_weight_is_sound(tmp_path):
    def whole(tensors: dict[str, Tensor], described: Described) -> None:
        tensors[f"{TO_Q}._weight_scale"] = tensors[f"{TO_Q}._weight_scale"][:1].clone()
        described["_data"]["block_size"] = list(tensors[f"{TO_Q}._weight_qdata"].shape)

    assert all(verdict.ok for verdict in check(changed(exported(tmp_path / "out", "W8A8_FP8_DYNAMIC"), whole)))


def test_what_torchao_writes_itself_is_sound_although_zeros_become_nan(tmp_path):
    def plain(tensors: dict[str, Tensor], described: Described) -> None:
        described["_data"]["act_quant_kwargs"]["_data"]["hp_value_lb"] = None

    verdicts = check(changed(exported(tmp_path / "out", "W8A8_FP8_DYNAMIC"), plain))
    assert [verdict.subject for verdict in verdicts if not verdict.ok] == ["tokens of zeros"]
    assert sound(verdicts, {"torchao"})
    assert TORCHAO[0].optional == {"tokens of zeros"}


@pytest.mark.parametrize("scales", [True, False])
def test_codes_whose_config_was_lost_are_a_negative_verdict(tmp_path, scales):
    folder = exported(tmp_path / "out", "W8A8_FP8_DYNAMIC")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    if scales:
        assert any("8-bit codes" in verdict.fact for verdict in inspected(folder))
        return
    tensors, _ = read(folder)
    (folder / WEIGHTS).unlink()
    save_file({name: tensor for name, tensor in tensors.items() if not name.endswith("_scale")}, folder / WEIGHTS)
    assert views(folder) == {}
