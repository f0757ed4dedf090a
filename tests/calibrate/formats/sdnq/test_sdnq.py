"""The format sdnq has the layout that sdnq 0.2.8 reads, and `octavo inspect` finds what sdnq would read wrongly."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor, nn

from octavo.calibrate.formats import format_named
from octavo.calibrate.formats.export import export
from octavo.calibrate.formats.inspect import check, sound, views
from octavo.calibrate.layers.modules import QuantizedLayer, build
from octavo.calibrate.plan import Plan
from octavo.calibrate.result import Result

from ....helpers.commands import octavo
from ....helpers.refusals import refused
from ....zoo.exported_sd3 import TO_Q, WEIGHTS, exported, reconfigured
from ....zoo.hard_sd3 import hard
from ....zoo.layer_kinds import TimedToy, changed, frozen
from ....zoo.toy import nearest
from ....zoo.video_pipelines import WAN

UP, DOWN = "transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.attn.to_out.0"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("sdnq") / "out"
    return exported(folder, formats=("sdnq",), activations="dynamic")


@pytest.fixture
def copied(made: Any, tmp_path: Path) -> Path:
    return shutil.copytree(made.folder, tmp_path / "copied")


def quantization(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return content


def failed(folder: Path) -> list[str]:
    return [f"{v.subject}: {v.fact}" for v in check(folder) if not v.ok and v.consumer == "SDNQ"]


def test_integers_and_scales_are_transposed_and_float_layers_listed(made):
    tensors, layers = load_file(made.folder / WEIGHTS), made.result.layers
    config = quantization(made.folder)
    for name, layer in layers.items():
        assert torch.equal(tensors[f"{name}.weight"], layer.weight.t())
        assert torch.equal(tensors[f"{name}.scale"], layer.weight_scale.view(1, -1))
        assert torch.equal(tensors[f"{name}.bias"], layer.bias)
    linears = {name for name, module in made.model.named_modules() if isinstance(module, nn.Linear)}
    assert config["modules_to_not_convert"] == sorted(f"{name}.weight" for name in linears - set(layers))
    assert config["use_quantized_matmul"] is True
    assert config["modules_to_not_use_matmul"] == []
    added = {f"{name}.scale" for name in layers}
    assert set(tensors) == set(made.model.state_dict()) | added


def test_float_inputs_are_kept_as_stored_and_several_files_hold_the_same(tmp_path):
    one = exported(tmp_path / "out", formats=("sdnq",), activations="float")
    config, tensors = quantization(one.folder), load_file(one.folder / WEIGHTS)
    assert config["use_quantized_matmul"] is False
    assert config["modules_to_not_use_matmul"] == sorted(f"{name}.weight" for name in one.result.layers)
    assert all(torch.equal(tensors[f"{name}.weight"], layer.weight) for name, layer in one.result.layers.items())
    export(one.result, one.model, tmp_path / "split", ("sdnq",), max_shard_size="60KB")
    files = sorted((tmp_path / "split").glob("*.safetensors"))
    assert len(files) > 2
    joined = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert joined.keys() == tensors.keys()
    assert all(torch.equal(joined[name], tensor) for name, tensor in tensors.items())
    assert failed(one.folder) == failed(tmp_path / "split") == []


def test_a_layer_too_small_for_a_product_of_integers_keeps_float_inputs(tmp_path):
    model = hard()
    small, large = "time_text_embed.text_embedder.linear_1", "context_embedder"  # 16 and 24 channels
    layers = {name: frozen(model.get_submodule(name), "W8A8_DYNAMIC") for name in (small, large, TO_Q)}
    export(Result(Plan(()), layers, {}), model, tmp_path / "out", ("sdnq",))
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert quantization(tmp_path / "out")["modules_to_not_use_matmul"] == [f"{large}.weight", f"{small}.weight"]
    assert tensors[f"{small}.weight"].shape == (32, 16)
    assert tensors[f"{TO_Q}.scale"].shape == (1, 32)
    assert failed(tmp_path / "out") == []


def test_folded_factors_reach_the_float_parameters(tmp_path):
    one = exported(tmp_path / "out", formats=("sdnq",), activations="dynamic")
    name = "context_embedder.bias"
    changed_bias = one.model.get_parameter(name) + 1
    one.result.parameters[name] = lambda: changed_bias
    export(one.result, one.model, tmp_path / "folded", ("sdnq",))
    assert torch.equal(load_file(tmp_path / "folded" / WEIGHTS)[name], changed_bias)


def test_inspect_finds_it_alone_and_beside_another_format(made, tmp_path):
    assert views(made.folder) == {"sdnq": made.folder}
    assert sound(check(made.folder), {"sdnq"})
    assert "for diffusers with sdnq" in octavo("inspect", made.folder)
    export(made.result, made.model, tmp_path / "both", ("diffusers", "sdnq"))
    assert views(tmp_path / "both")["sdnq"] == tmp_path / "both" / "sdnq"
    assert json.loads(octavo("inspect", tmp_path / "both", "--json"))["sound"] is True


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{TO_Q}.scale"), f"{TO_Q}.scale is missing"),
        (lambda t: t.update({f"{TO_Q}.scale": t[f"{TO_Q}.scale"].t().contiguous()}), "square layers give noise"),
        (lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"].t().contiguous()}), f"{UP}.weight is [128, 32]"),
        (lambda t: t.update({f"{TO_Q}.scale": -t[f"{TO_Q}.scale"]}), "a scale is negative"),
        (lambda t: t.update({f"{TO_Q}.scale": t[f"{TO_Q}.scale"].int()}), f"{TO_Q}.scale is int32"),
        (lambda t: t.update({f"{DOWN}.input_scale": torch.ones(1)}), f"ignores {DOWN}.input_scale"),
    ],
)
def test_wrong_tensors_are_found(copied: Path, change: Callable[[dict[str, Tensor]], object], words: str):
    changed(copied, change)
    assert any(words in line for line in failed(copied))
    assert not sound(check(copied), {"sdnq"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["quantization_config"].update(use_quantized_matmul=False), "square layers give noise"),
        (lambda c: c["quantization_config"]["modules_to_not_use_matmul"].append("attn"), "square layers give noise"),
        (lambda c: c["quantization_config"]["modules_to_not_convert"].append("to_q"), "integers for float weights"),
        (lambda c: c["quantization_config"]["modules_to_not_convert"].remove("proj_out.weight"), "proj_out.weight is"),
        (lambda c: c["quantization_config"].update(use_svd=True), "svd_up is missing"),
        (lambda c: c["quantization_config"].update(modules_to_not_convert=7), "is float and not in"),
    ],
)
def test_wrong_settings_are_found(copied: Path, change: Callable[[dict[str, Any]], object], words: str):
    reconfigured(copied, change)
    assert any(words in line for line in failed(copied))


def test_other_kinds_of_sdnq_checkpoints_are_described_and_not_judged(copied):
    reconfigured(copied, lambda config: config["quantization_config"].update(weights_dtype="uint4"))
    assert failed(copied) == []
    assert any("Octavo checks int8 only" in v.fact for v in check(copied))


def test_what_sdnq_cannot_hold_is_refused_in_one_line(tmp_path):
    def refusal(model: nn.Module, layers: dict[str, QuantizedLayer], words: str) -> None:
        refused(lambda: export(Result(Plan(()), layers, {}), model, tmp_path / "out", ("sdnq",)), 2, words)
        assert not (tmp_path / "out").exists()

    model = hard()
    linear = model.get_submodule(TO_Q)
    refusal(model, {TO_Q: frozen(linear, "W8A8")}, "whose scheme is W8A8")
    refusal(model, {"pos_embed.proj": frozen(model.pos_embed.proj, "W8A16")}, "is a convolution")
    bare = nn.Linear(32, 32, bias=False)
    numbers = nearest(bare.weight, None, frozen(bare, "W8A8_DYNAMIC").input, correction=torch.ones(32))
    refusal(model, {TO_Q: build(numbers, bare)}, "no bias in the float model")
    model.transformer_blocks[1].attn.to_q = linear
    refusal(model, {TO_Q: frozen(linear, "W8A8_DYNAMIC")}, "which sdnq replaces one only")
    wan = WanTransformer3DModel(**WAN, in_channels=4)
    time = "condition_embedder.time_embedder.linear_1"
    refusal(wan, {time: frozen(wan.get_submodule(time), "W8A16")}, "inputs in float32")
    assert format_named("sdnq").kept_float(wan, [time, "blocks.0.attn1.to_q"], "W8A16") == {time}
    toy = TimedToy()
    refusal(toy, {"up": frozen(toy.up, "W8A8_DYNAMIC")}, "is not a diffusers model")
    assert format_named("sdnq").made_biases is False
