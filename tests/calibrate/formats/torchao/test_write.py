"""The format torchao has the layout that torchao 0.18 writes, and an installed torchao loads the same integers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors import safe_open
from torch import Tensor, nn

import octavo  # noqa: F401 - it registers
from octavo.calibrate.formats.export import export
from octavo.calibrate.layers.inputs import FloatInput
from octavo.calibrate.layers.modules import QuantizedLayer, build
from octavo.calibrate.plan import Plan
from octavo.calibrate.replay.sqnr import Power, outputs
from octavo.calibrate.result import Result

from ....helpers.refusals import refused
from ....zoo.hard_sd3 import calibrated, hard, prompts
from ....zoo.layer_kinds import frozen
from ....zoo.pipelines import sd3
from ....zoo.toy import nearest

WEIGHTS = "diffusion_pytorch_model.safetensors"
TO_Q = "transformer_blocks.0.attn.to_q"


def exported(folder: Path, formats: tuple[str, ...] = ("torchao",), **settings: Any) -> tuple[nn.Module, Result]:
    model = hard()
    result = calibrated(model, prompts(3, 2), **settings)
    export(result, model, folder, formats)
    return model, result


def test_several_files_hold_the_same_tensors_and_the_whole_metadata_each(tmp_path):
    model, result = exported(tmp_path / "whole")
    export(result, model, tmp_path / "split", ("torchao",), max_shard_size="60KB")
    whole, described = read(tmp_path / "whole")
    files = sorted((tmp_path / "split").glob("*.safetensors"))
    parts = [read(file.parent, file.name) for file in files]
    assert len(parts) > 2
    assert all(metadata == described for _, metadata in parts)
    joined = {name: tensor for tensors, _ in parts for name, tensor in tensors.items()}
    assert joined.keys() == whole.keys()
    assert all(torch.equal(joined[name], tensor) for name, tensor in whole.items())


def read(folder: Path, name: str = WEIGHTS) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(folder / name, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.parametrize(
    ("activations", "granularity", "mapping"),
    [("static", "PerTensor", "ASYMMETRIC"), ("dynamic", "PerRow", "SYMMETRIC"), ("float", None, None)],
)
def test_every_tensor_is_named_and_described(tmp_path, activations, granularity, mapping):
    model, result = exported(tmp_path / "out", activations=activations)
    tensors, metadata = read(tmp_path / "out")
    names = json.loads(metadata["tensor_names"])
    assert sorted(names) == sorted(model.state_dict())
    accounted: set[str] = set()
    for name in names:
        kind, (owner, _, leaf) = json.loads(metadata[name]), name.rpartition(".")
        if kind == {"_type": "Tensor"}:
            accounted.add(name)
            continue
        assert (kind["_type"], leaf) == ("Int8Tensor", "weight")
        assert kind["_data"]["block_size"] == [1, model.get_parameter(name).shape[1]]
        accounted |= {f"{owner}._weight_{part}" for part in kind["_tensor_data_names"]}
    assert accounted == set(tensors)
    kwargs = json.loads(metadata[f"{TO_Q}.weight"])["_data"]["act_quant_kwargs"]
    assert (kwargs and kwargs["_data"]["granularity"]["_type"]) == granularity
    assert (kwargs and kwargs["_data"]["mapping_type"]["_data"]) == mapping
    assert {name for name in names if json.loads(metadata[name])["_type"] == "Int8Tensor"} == {
        f"{name}.weight" for name in result.layers
    }


def test_the_integers_and_the_axes_of_the_scales(tmp_path):
    _, result = exported(tmp_path / "out")
    tensors, _ = read(tmp_path / "out")
    for name, layer in result.layers.items():
        part = f"{name}._weight_"
        assert torch.equal(tensors[part + "qdata"], layer.weight)
        scale = tensors[part + "scale"].flatten()
        torch.testing.assert_close(scale * layer.input_scale, layer.deq, rtol=2.0**-22, atol=0.0)
        assert tensors[part + "act_quant_scale"].ndim == (2 if "norm" in name else 3)
        assert tensors[part + "act_quant_zero_point"].dtype == torch.int8
        assert tensors[part + "act_quant_scale"].item() == layer.input_scale.item()
        assert tensors[part + "act_quant_zero_point"].item() == layer.input_zero_point.item()


def test_a_multiplier_that_was_not_folded_stands_beside_the_weight(tmp_path):
    for folded in (False, True):
        _, result = exported(tmp_path / str(folded), smoothing=True, fold=folded)
        tensors, _ = read(tmp_path / str(folded))
        names = {name.removesuffix("._weight_act_pre_scale") for name in tensors if name.endswith("act_pre_scale")}
        assert names == {name for name, layer in result.layers.items() if layer.mul_scale is not None}


def test_the_config_is_for_torchao_and_in_a_folder_of_its_own_beside_another(tmp_path):
    exported(tmp_path / "out", ("ascend", "torchao"))
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["quant_method"] == "torchao"
    )
    exported(tmp_path / "both", ("diffusers", "torchao"))
    methods = [
        json.loads((tmp_path / "both" / place / "config.json").read_text())["quantization_config"]["quant_method"]
        for place in (".", "torchao")
    ]
    assert methods == ["octavo", "torchao"]


def refused_export(model: nn.Module, layers: dict[str, QuantizedLayer], folder: Path, axes: dict[str, int]) -> str:
    message = refused(lambda: export(Result(Plan(()), layers, {}, axes=axes), model, folder / "out", ("torchao",)), 2)
    assert not (folder / "out").exists()
    return message


def test_what_torchao_has_no_form_for_is_refused_in_one_line(tmp_path):
    model = sd3()[0].transformer.requires_grad_(False)
    linear = model.get_submodule(TO_Q)
    assert "convolution" in refused_export(
        model, {"pos_embed.proj": frozen(model.pos_embed.proj, "W8A8")}, tmp_path, {}
    )
    assert "scheme is W8A8_TIMESTEP" in refused_export(
        model, {TO_Q: frozen(linear, "W8A8_TIMESTEP")}, tmp_path, {TO_Q: 3}
    )
    for axes in ({}, {TO_Q: 0}):
        assert "number of axes is unknown or changes" in refused_export(
            model, {TO_Q: frozen(linear, "W8A8")}, tmp_path, axes
        )
    bare = nearest(linear.weight, None, FloatInput(), correction=torch.ones(len(linear.weight)))
    assert "no bias in the float model" in refused_export(model, {TO_Q: build(bare, linear)}, tmp_path, {})


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{"smoothing": True}, {"activations": "dynamic"}, {"activations": "float"},
     {"smoothing": True, "weights": ("gptq",), "bias_correction": True}],
)  # fmt: skip
def test_torchao_computes_what_octavo_does_and_writes_the_same_file(tmp_path, settings):
    pytest.importorskip("torchao")
    model, _ = exported(tmp_path / "out", ("diffusers", "torchao"), **settings)
    ours = SD3Transformer2DModel.from_pretrained(tmp_path / "out")
    theirs = SD3Transformer2DModel.from_pretrained(tmp_path / "out" / "torchao", torch_dtype=torch.float32)
    assert type(theirs.get_submodule(TO_Q).weight).__name__ == "Int8Tensor"
    calls, apart, from_float = prompts(3, 2), Power(), Power()
    for exact, one, other in zip(*(outputs(denoiser, calls) for denoiser in (model, ours, theirs)), strict=True):
        apart.add(one[0], other[0])
        from_float.add(exact[0], one[0])
    assert (apart.sqnr or 0.0) > (from_float.sqnr or 0.0) - 1.0
    result = calibrated(model, prompts(3, 2), **settings)
    export(result, model, tmp_path / "split", ("torchao",), max_shard_size="60KB")
    split = SD3Transformer2DModel.from_pretrained(tmp_path / "split", torch_dtype=torch.float32)
    for one, other in zip(*(outputs(denoiser, calls) for denoiser in (theirs, split)), strict=True):
        assert torch.equal(one[0], other[0])
    theirs.save_pretrained(tmp_path / "again")
    before, after = read(tmp_path / "out" / "torchao"), read(tmp_path / "again")
    assert before[1] == after[1]
    assert {name: tensor.tolist() for name, tensor in before[0].items()} == {n: t.tolist() for n, t in after[0].items()}
