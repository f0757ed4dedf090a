"""The format vllm-omni has the layout that vLLM-Omni 0.30.0 reads, and `octavo inspect` finds what it would read
wrongly."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from octavo.calibrate.formats import format_named
from octavo.calibrate.formats.export import export
from octavo.calibrate.formats.inspect import check, sound, views
from octavo.calibrate.formats.vllm_omni.models import MODELS, UNTHREADED
from octavo.calibrate.layers.modules import QuantizedLayer
from octavo.calibrate.plan import Plan
from octavo.calibrate.result import Result

from ....helpers.refusals import refused
from ....zoo.exported_sd3 import WEIGHTS, reconfigured
from ....zoo.hard_sd3 import hard
from ....zoo.image_pipelines import flux2, qwen_image, z_image
from ....zoo.layer_kinds import changed, frozen
from ....zoo.pipelines import flux, wan22

PIPELINES = {
    "QwenImageTransformer2DModel": qwen_image, "FluxTransformer2DModel": flux, "Flux2Transformer2DModel": flux2,
    "WanTransformer3DModel": wan22, "ZImageTransformer2DModel": z_image,
}  # fmt: skip
TO_Q, TO_K, MOD = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k", "transformer_blocks.0.img_mod.1"


def transformer(kind: str) -> nn.Module:
    model: nn.Module = PIPELINES[kind]()[0].transformer.eval().requires_grad_(False)
    return model


def linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def written(folder: Path, model: nn.Module, names: list[str], kind: str = "W8A8_DYNAMIC", **more: Any) -> Result:
    layers = {name: frozen(model.get_submodule(name), kind, clamping=True) for name in names}
    result = Result(Plan(()), layers, {})
    export(result, model, folder, more.pop("formats", ("vllm-omni",)), **more)
    return result


def quantization(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return content


def failed(folder: Path) -> list[str]:
    return [f"{v.subject}: {v.fact}" for v in check(folder) if not v.ok and v.consumer == "vLLM-Omni"]


@pytest.mark.parametrize("kind", MODELS)
def test_layers_that_the_runtime_holds_are_integers_and_all_others_float(tmp_path, kind):
    model = transformer(kind)
    names = linears(model)
    result = written(tmp_path / "out", model, names)
    tensors, held = load_file(tmp_path / "out" / WEIGHTS), {name for name in names if MODELS[kind].holds(name)}
    assert 0 < len(held) < len(names)
    for pattern in MODELS[kind].integer:  # no pattern is for layers that this model does not have
        if not pattern.endswith(("add_k_proj", "add_v_proj")):
            assert any(MODELS[kind].__class__((pattern,)).holds(name) for name in names), pattern
    for name in names:
        layer, weight = result.layers[name], tensors[f"{name}.weight"]
        if name in held:
            assert torch.equal(weight, layer.weight)
            assert torch.equal(tensors[f"{name}.weight_scale"], layer.weight_scale.view(-1, 1))
        else:
            assert torch.equal(weight, layer.weight.float() * layer.weight_scale.view(-1, 1))
    added = {f"{name}.weight_scale" for name in held}
    assert set(tensors) == set(model.state_dict()) | added
    assert quantization(tmp_path / "out") == {
        "quant_method": "int8", "activation_scheme": "dynamic", "is_checkpoint_int8_serialized": True,
        "ignored_layers": [],
    }  # fmt: skip
    assert failed(tmp_path / "out") == []


def test_a_float_part_makes_the_joined_layer_float_by_both_names(tmp_path):
    model = transformer("QwenImageTransformer2DModel")
    names = [name for name in linears(model) if name != TO_K]
    result = written(tmp_path / "out", model, names)
    tensors, block = load_file(tmp_path / "out" / WEIGHTS), "transformer_blocks.0.attn"
    assert quantization(tmp_path / "out")["ignored_layers"] == [
        f"{block}.to_k", f"{block}.to_q", f"{block}.to_qkv", f"{block}.to_v"
    ]  # fmt: skip
    layer = result.layers[TO_Q]
    assert torch.equal(tensors[f"{TO_Q}.weight"], layer.weight.float() * layer.weight_scale.view(-1, 1))
    assert torch.equal(tensors[f"{TO_K}.weight"], model.get_parameter(f"{TO_K}.weight"))
    assert failed(tmp_path / "out") == []


def test_several_files_hold_the_same_tensors(tmp_path):
    model = transformer("ZImageTransformer2DModel")
    result = written(tmp_path / "out", model, linears(model))
    export(result, model, tmp_path / "split", ("vllm-omni",), max_shard_size="20KB")
    files = sorted((tmp_path / "split").glob("*.safetensors"))
    joined = {name: tensor for path in files for name, tensor in load_file(path).items()}
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert len(files) > 2
    assert joined.keys() == tensors.keys()
    assert all(torch.equal(joined[name], tensor) for name, tensor in tensors.items())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = transformer("QwenImageTransformer2DModel")
    folder = tmp_path_factory.mktemp("omni") / "out"
    written(folder, model, [name for name in linears(model) if "img_mlp.net.2" not in name])
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "copied")


def test_inspect_describes_it_and_it_never_shares_a_folder_with_other_weights(made, tmp_path):
    assert views(made) == {"vllm-omni": made}
    assert sound(check(made), {"vllm-omni"})
    describe = format_named("vllm-omni").describe
    assert describe is not None
    assert describe(made).title == "a QwenImageTransformer2DModel for vLLM-Omni"
    model = transformer("QwenImageTransformer2DModel")
    written(tmp_path / "both", model, linears(model), formats=("ascend", "vllm-omni"))
    assert views(tmp_path / "both") == {"ascend": tmp_path / "both", "vllm-omni": tmp_path / "both" / "vllm-omni"}
    written(tmp_path / "turned", model, linears(model), formats=("vllm-omni", "ascend"))
    assert views(tmp_path / "turned")["ascend"] == tmp_path / "turned" / "ascend"
    assert failed(tmp_path / "both") == failed(tmp_path / "turned") == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{TO_Q}.weight_scale"), f"{TO_Q}.weight_scale is missing: vLLM-Omni computes with"),
        (lambda t: t.update({f"{TO_Q}.weight_scale": t[f"{TO_Q}.weight_scale"].half()}), "not float32 [32, 1]"),
        (lambda t: t.update({f"{TO_Q}.weight_scale": t[f"{TO_Q}.weight_scale"].flatten()}), "is float32 [32], not"),
        (lambda t: t.update({f"{TO_Q}.input_scale": torch.ones(1)}), "ends loading with a KeyError"),
        (lambda t: t.update({f"{TO_Q}.div.mul_scale": torch.ones(32)}), "ends loading with a KeyError"),
        (lambda t: t.update({f"{TO_Q}.weight": t[f"{TO_Q}.weight"].float()}), "would cut its weights to integers"),
        (lambda t: t.update({f"{MOD}.weight": t[f"{MOD}.weight"].to(torch.int8),
                             f"{MOD}.weight_scale": torch.ones(192, 1)}), f"{MOD} is int8, and vLLM-Omni takes"),
    ],
)  # fmt: skip
def test_wrong_tensors_are_found(copied: Path, change: Callable[[dict[str, Tensor]], object], words: str):
    changed(copied, change)
    assert any(words in line for line in failed(copied))
    assert not sound(check(copied), {"vllm-omni"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q: q.pop("is_checkpoint_int8_serialized"), "quantizes them again, without an error"),
        (lambda q: q.update(is_checkpoint_int8_serialized=False), "quantizes them again, without an error"),
        (lambda q: q.update(modules_to_not_convert=[]), "ends loading with a TypeError"),
        (lambda q: q.update(activation_scheme="static"), "accepts 'dynamic' only"),
        (lambda q: q["ignored_layers"].append("transformer_blocks.0.attn.to_qkv"), "integers become float weights"),
        (lambda q: q["ignored_layers"].clear(), "would cut its weights to integers"),
        (lambda q: q.update(ignored_layers="to_q"), "ignored_layers is not a list"),
    ],
)
def test_wrong_settings_are_found(copied: Path, change: Callable[[dict[str, Any]], object], words: str):
    reconfigured(copied, lambda config: change(config["quantization_config"]))
    assert any(words in line for line in failed(copied))


def test_models_that_the_runtime_does_not_thread_are_named(copied):
    reconfigured(copied, lambda config: config.update(_class_name="SD3Transformer2DModel"))
    assert any("model: vLLM-Omni does not pass" in line for line in failed(copied))
    reconfigured(copied, lambda config: config.update(_class_name="NewTransformer2DModel"))
    assert not any(line.startswith("model") for line in failed(copied))


def test_wide_layers_are_float_on_ascend_only(tmp_path):
    model = transformer("FluxTransformer2DModel")
    model.single_transformer_blocks[0].proj_mlp = nn.Linear(32, 65536, bias=False)
    written(tmp_path / "out", model, linears(model))
    assert any("more than 65535 outputs" in line for line in failed(tmp_path / "out"))
    assert sound(check(tmp_path / "out"), {"vllm-omni"})


def test_what_the_runtime_cannot_hold_is_refused_in_one_line(tmp_path):
    def refusal(model: nn.Module, layers: dict[str, QuantizedLayer], words: str) -> None:
        refused(lambda: export(Result(Plan(()), layers, {}), model, tmp_path / "out", ("vllm-omni",)), 2, words)
        assert not (tmp_path / "out").exists()

    sd3, qwen = hard(), transformer("QwenImageTransformer2DModel")
    refusal(sd3, {TO_Q: frozen(sd3.get_submodule(TO_Q), "W8A8_DYNAMIC")}, "ends with a KeyError")
    refusal(qwen, {TO_Q: frozen(qwen.get_submodule(TO_Q), "W8A8")}, "whose scheme is W8A8")
    record = format_named("vllm-omni")
    assert record.refusal("QwenImageTransformer2DModel", {}) is None
    assert all("KeyError" in str(record.refusal(name, {})) for name in UNTHREADED)
    assert "has no list of the layers" in str(record.refusal("NewTransformer2DModel", {}))


MXFP8 = "W8A8_MXFP8"


def blocked(model: nn.Module) -> list[str]:
    """Returns the linears whose number of inputs 32 divides."""
    return [name for name in linears(model) if model.get_submodule(name).in_features % 32 == 0]


@pytest.mark.parametrize("kind", MODELS)
def test_mxfp8_layers_are_codes_and_all_others_float(tmp_path, kind):
    model = transformer(kind)
    names = blocked(model)
    result = written(tmp_path / "out", model, names, MXFP8)
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    held = MODELS[kind].written(names, linears(model))
    assert held
    for name in names:
        layer, weight = result.layers[name], tensors[f"{name}.weight"]
        if name in held:
            assert torch.equal(weight.view(torch.uint8), layer.weight.view(torch.uint8))
            assert torch.equal(tensors[f"{name}.weight_scale"], layer.weight_scale)
        else:
            powers = torch.exp2(layer.weight_scale.float() - 127).repeat_interleave(32, 1)
            assert torch.equal(weight, layer.weight.float() * powers)
    assert set(tensors) == set(model.state_dict()) | {f"{name}.weight_scale" for name in held}
    settings = quantization(tmp_path / "out")
    floats = {name for name in linears(model) if MODELS[kind].holds(name) and name not in held}
    assert settings.pop("ignored_layers") == sorted({*floats, *map(MODELS[kind].name, floats)})
    assert settings == {"quant_method": "mxfp8", "is_checkpoint_mxfp8_serialized": True}
    assert failed(tmp_path / "out") == []
    assert views(tmp_path / "out") == {"vllm-omni": tmp_path / "out"}
    assert sound(check(tmp_path / "out"), {"vllm-omni"})
    describe = format_named("vllm-omni").describe
    assert describe is not None
    assert describe(tmp_path / "out").schemes == {MXFP8: len(held)}


@pytest.fixture(scope="module")
def made_mxfp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = transformer("QwenImageTransformer2DModel")
    folder = tmp_path_factory.mktemp("omni") / "out"
    written(folder, model, [name for name in blocked(model) if "img_mlp.net.2" not in name], MXFP8)
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{TO_Q}.weight_scale"), f"{TO_Q}.weight_scale is missing: vLLM-Omni computes with"),
        (lambda t: t.update({f"{TO_Q}.weight_scale": t[f"{TO_Q}.weight_scale"].float()}), "not uint8 [32, 1]"),
        (lambda t: t.update({f"{TO_Q}.weight_scale": t[f"{TO_Q}.weight_scale"].view(32)}), "is uint8 [32], not"),
        (lambda t: t.update({f"{TO_Q}.input_scale": torch.ones(1)}), "ends loading with a KeyError"),
        (lambda t: t.update({f"{TO_Q}.weight": t[f"{TO_Q}.weight"].float()}), "would cut its weights to codes"),
        (lambda t: t.update({f"{TO_Q}.weight": t[f"{TO_Q}.weight"].view(torch.int8)}), "takes its codes for float"),
        (lambda t: t.update({f"{MOD}.weight": t[f"{MOD}.weight"].to(torch.float8_e4m3fn),
                             f"{MOD}.weight_scale": torch.ones(192, 1, dtype=torch.uint8)}), f"{MOD} is mxfp8, and"),
    ],
)  # fmt: skip
def test_wrong_tensors_of_mxfp8_are_found(made_mxfp8, tmp_path, change, words: str):
    folder = shutil.copytree(made_mxfp8, tmp_path / "copied")
    assert failed(folder) == []
    changed(folder, change)
    assert any(words in line for line in failed(folder))
    assert not sound(check(folder), {"vllm-omni"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q: q.pop("is_checkpoint_mxfp8_serialized"), "quantizes them again, without an error"),
        (lambda q: q.update(activation_scheme="dynamic"), "ends loading with a TypeError"),
        (lambda q: q["ignored_layers"].append("transformer_blocks.0.attn.to_qkv"), "codes become float weights"),
        (lambda q: q["ignored_layers"].clear(), "would cut its weights to codes"),
        (lambda q: q.update(quant_method="int8", is_checkpoint_int8_serialized=True), "ends loading with a TypeError"),
    ],
)
def test_wrong_settings_of_mxfp8_are_found(made_mxfp8, tmp_path, change, words: str):
    folder = shutil.copytree(made_mxfp8, tmp_path / "copied")
    reconfigured(folder, lambda config: change(config["quantization_config"]))
    assert any(words in line for line in failed(folder))


def test_layers_of_several_methods_are_refused(tmp_path):
    model = transformer("QwenImageTransformer2DModel")
    layers = {TO_Q: frozen(model.get_submodule(TO_Q), MXFP8), TO_K: frozen(model.get_submodule(TO_K), "W8A8_DYNAMIC")}
    refused(
        lambda: export(Result(Plan(()), layers, {}), model, tmp_path / "out", ("vllm-omni",)), 2,
        "cannot hold layers of W8A8_DYNAMIC and W8A8_MXFP8 together",
    )  # fmt: skip
