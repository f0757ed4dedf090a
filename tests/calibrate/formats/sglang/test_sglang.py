"""The format sglang has the layout that SGLang 0.5.23 reads, and `octavo inspect` finds what SGLang would read wrongly,
also in checkpoints of the format ascend and of msModelSlim."""

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
from octavo.calibrate.formats.export import export, kept_float
from octavo.calibrate.formats.inspect import check, sound, views
from octavo.calibrate.formats.sglang.models import MODELS, UNTHREADED
from octavo.calibrate.layers.modules import QuantizedLayer
from octavo.calibrate.plan import Plan
from octavo.calibrate.result import Result

from ....helpers.refusals import refused
from ....zoo.exported_sd3 import WEIGHTS, reconfigured
from ....zoo.hard_sd3 import hard
from ....zoo.image_pipelines import flux2, qwen_image, z_image
from ....zoo.layer_kinds import changed, frozen, unlisted
from ....zoo.pipelines import flux, wan22

PIPELINES = {
    "QwenImageTransformer2DModel": qwen_image, "FluxTransformer2DModel": flux, "Flux2Transformer2DModel": flux2,
    "WanTransformer3DModel": wan22, "ZImageTransformer2DModel": z_image,
}  # fmt: skip
DESCRIPTION = "quant_model_description.json"
TO_Q, MOD, DOWN = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.img_mod.1", "blocks.0.ffn.net.2"


def transformer(kind: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    model: nn.Module = PIPELINES[kind]()[0].transformer.eval().requires_grad_(False).to(dtype)
    return model


def linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def written(folder: Path, model: nn.Module, names: list[str], scheme: str = "W8A8", **more: Any) -> Result:
    layers = {name: frozen(model.get_submodule(name), scheme, clamping=True) for name in names}
    result = Result(Plan(()), layers, {})
    export(result, model, folder, more.pop("formats", ("sglang",)), **more)
    return result


def description(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text())
    return content


def failed(folder: Path) -> list[str]:
    return [f"{v.subject}: {v.fact}" for v in check(folder) if not v.ok and v.consumer == "SGLang"]


@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_DYNAMIC"])
@pytest.mark.parametrize("kind", MODELS)
def test_layers_are_described_by_the_names_of_both_and_others_are_float(tmp_path, kind, scheme):
    model = transformer(kind)
    names = linears(model)
    result, native = written(tmp_path / "out", model, names, scheme), MODELS[kind]
    tensors, described = load_file(tmp_path / "out" / WEIGHTS), description(tmp_path / "out")
    for name in names:
        layer, weight = result.layers[name], tensors[f"{name}.weight"]
        if native.holds(name):
            assert described[f"{name}.weight"] == described[f"{native.name(name)}.weight"] == scheme
            assert torch.equal(weight, layer.weight)
            if scheme == "W8A8":
                assert torch.equal(tensors[f"{name}.deq_scale"], layer.deq)  # as float32
                assert torch.equal(tensors[f"{name}.quant_bias"], layer.quant_bias)
        else:
            assert described[f"{name}.weight"] == "FLOAT"
            exact = layer.weight.float() * layer.weight_scale.view(-1, 1)
            assert torch.equal(weight, exact.bfloat16())
    added = {f"{native.name(name)}.weight" for name in names if native.holds(name)}
    assert set(described) == set(tensors) | added | {"model_quant_type"}
    assert failed(tmp_path / "out") == []


def test_float_layers_are_described_by_the_runtimes_names(tmp_path):
    model = transformer("WanTransformer3DModel")
    written(tmp_path / "out", model, [name for name in linears(model) if name != DOWN])
    described = description(tmp_path / "out")
    assert described["blocks.0.ffn.fc_out.weight"] == described[f"{DOWN}.weight"] == "FLOAT"
    assert described["blocks.1.ffn.fc_out.weight"] == "W8A8"
    assert failed(tmp_path / "out") == []


def test_folded_factors_and_several_files(tmp_path):
    model = transformer("QwenImageTransformer2DModel")
    result = written(tmp_path / "out", model, linears(model))
    name = "transformer_blocks.0.attn.norm_q.weight"
    folded = model.get_parameter(name) * 2
    result.parameters[name] = lambda: folded
    export(result, model, tmp_path / "split", ("sglang",), max_shard_size="20KB")
    files = sorted((tmp_path / "split").glob("*.safetensors"))
    joined = {name: tensor for path in files for name, tensor in load_file(path).items()}
    whole = load_file(tmp_path / "out" / WEIGHTS)
    assert len(files) > 2
    assert torch.equal(joined.pop(name), folded)
    assert all(torch.equal(joined[key], whole[key]) for key in joined)
    assert joined.keys() == whole.keys() - {name}
    assert failed(tmp_path / "split") == []


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = transformer("QwenImageTransformer2DModel")
    folder = tmp_path_factory.mktemp("sglang") / "out"
    written(folder, model, [name for name in linears(model) if name != MOD])
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "copied")


def test_inspect_finds_it_alone_and_in_a_folder_of_its_own(made, tmp_path):
    assert views(made) == {"sglang": made}
    assert sound(check(made), {"sglang"})
    record = format_named("sglang")
    assert record.describe is not None
    assert record.describe(made).title == "a QwenImageTransformer2DModel for SGLang on Ascend"
    assert record.describe(made).schemes == {"W8A8": 30}
    model = transformer("QwenImageTransformer2DModel")
    written(tmp_path / "both", model, linears(model), formats=("ascend", "sglang"))
    assert views(tmp_path / "both") == {"ascend": tmp_path / "both", "sglang": tmp_path / "both" / "sglang"}
    assert failed(tmp_path / "both") == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{TO_Q}.weight_scale"), f"{TO_Q}.weight_scale is missing: ones, with a warning only"),
        (lambda t: t.pop(f"{TO_Q}.input_scale"), f"{TO_Q}.input_scale is missing: ones, with a warning only"),
        (lambda t: t.pop(f"{TO_Q}.deq_scale"), "a ValueError"),
        (lambda t: t.pop(f"{TO_Q}.weight_offset"), "a ValueError"),
        (lambda t: t.pop(f"{TO_Q}.quant_bias"), "a RuntimeError"),
        (lambda t: t.update({f"{TO_Q}.deq_scale": torch.ones(32, dtype=torch.int64)}), "takes the bits for a number"),
        (lambda t: t.update({f"{TO_Q}.div.mul_scale": torch.ones(32)}), f"skips {TO_Q}.div.mul_scale"),
    ],
)
def test_wrong_tensors_are_found(copied: Path, change: Callable[[dict[str, Tensor]], object], words: str):
    changed(copied, change)
    assert any(words in line for line in failed(copied))
    assert not sound(check(copied), {"sglang"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update({f"{TO_Q}.weight": "W8A16"}), "which SGLang does not know: a NotImplementedError"),
        (lambda d: d.update({f"{TO_Q}.weight": "W8A8_TIMESTEP"}), "which SGLang does not know"),
        (lambda d: d.pop("transformer_blocks.0.img_mod.weight"), "is not described as FLOAT: a NotImplementedError"),
        (lambda d: d.pop("transformer_blocks.1.img_mod.weight"), "is not described as W8A8: a NotImplementedError"),
        (lambda d: d.update(ignore=["img_in"]), "is not described as W8A8"),
    ],
)
def test_wrong_descriptions_are_found(copied: Path, change: Callable[[dict[str, Any]], object], words: str):
    content = description(copied)
    change(content)
    rewritten(copied, content)
    assert any(words in line for line in failed(copied))


def rewritten(folder: Path, content: Any) -> None:
    unlisted(folder)
    (folder / DESCRIPTION).unlink()
    (folder / DESCRIPTION).write_text(json.dumps(content))


def test_an_ignored_layer_needs_no_key_of_its_own(copied):
    content = description(copied)
    del content["transformer_blocks.0.img_mod.weight"]
    rewritten(copied, content | {"ignore": ["transformer_blocks.0.img_mod"]})
    assert failed(copied) == []


def test_models_that_the_runtime_does_not_thread_are_named(copied):
    reconfigured(copied, lambda config: config.update(_class_name="SD3Transformer2DModel"))
    assert any("never uses it: integers become bfloat16 weights" in line for line in failed(copied))
    reconfigured(copied, lambda config: config.update(_class_name="FluxTransformer2DModel"))
    assert any("takes its integers for bfloat16 weights" in line for line in failed(copied))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1}', "\x00"])
def test_damaged_descriptions_give_negative_verdicts(copied, text):
    unlisted(copied)
    (copied / DESCRIPTION).unlink()
    (copied / DESCRIPTION).write_text(text)
    assert failed(copied)


def test_a_checkpoint_for_mindie_stays_sound_and_is_judged_for_sglang_too(tmp_path):
    model = transformer("QwenImageTransformer2DModel", torch.float16)
    written(tmp_path / "half", model, linears(model), formats=("ascend",))
    assert any("takes the bits for a number" in line for line in failed(tmp_path / "half"))
    assert sound(check(tmp_path / "half"), {"ascend"})
    written(tmp_path / "weights", model, linears(model), "W8A16", formats=("ascend",))
    assert any("is W8A16, which SGLang does not know" in line for line in failed(tmp_path / "weights"))
    model = transformer("QwenImageTransformer2DModel")
    written(tmp_path / "brain", model, linears(model), formats=("ascend",))
    assert failed(tmp_path / "brain") == []


def test_what_the_runtime_cannot_hold_is_refused_in_one_line(tmp_path):
    def refusal(model: nn.Module, layers: dict[str, QuantizedLayer], words: str) -> None:
        refused(lambda: export(Result(Plan(()), layers, {}), model, tmp_path / "out", ("sglang",)), 2, words)
        assert not (tmp_path / "out").exists()

    sd3, qwen = hard(), transformer("QwenImageTransformer2DModel", torch.float16)
    refusal(sd3, {TO_Q: frozen(sd3.get_submodule(TO_Q), "W8A8")}, "never uses it")
    refusal(qwen, {TO_Q: frozen(qwen.get_submodule(TO_Q), "W8A8")}, "Use --dtype bfloat16")
    qwen = transformer("QwenImageTransformer2DModel", torch.bfloat16)
    refusal(qwen, {TO_Q: frozen(qwen.get_submodule(TO_Q), "W8A16")}, "whose scheme is W8A16")
    record = format_named("sglang")
    assert record.refusal("WanTransformer3DModel", {}) is None
    assert all("SGLang" in str(record.refusal(name, {})) for name in UNTHREADED)


MXFP8, DOWN_MLP = "W8A8_MXFP8", "transformer_blocks.0.img_mlp.net.2"


PAIRED = {  # tiny models without a layer of pairs of blocks: the layer that gets 128 inputs
    "FluxTransformer2DModel": "single_transformer_blocks.0.proj_out", "WanTransformer3DModel": DOWN,
}  # fmt: skip


def blocked(model: nn.Module, multiple: int = 32) -> list[str]:
    """Returns the linears whose number of inputs `multiple` divides."""
    return [name for name in linears(model) if model.get_submodule(name).in_features % multiple == 0]


@pytest.mark.parametrize("kind", MODELS)
def test_mxfp8_layers_with_pairs_of_blocks_are_codes_and_others_float(tmp_path, kind):
    model = transformer(kind)
    if kind in PAIRED:
        owner, _, leaf = PAIRED[kind].rpartition(".")
        layer = nn.Linear(128, model.get_submodule(PAIRED[kind]).out_features).requires_grad_(False).bfloat16()
        setattr(model.get_submodule(owner), leaf, layer)
    names, native = blocked(model), MODELS[kind]
    result = written(tmp_path / "out", model, names, MXFP8)
    tensors, words = load_file(tmp_path / "out" / WEIGHTS), description(tmp_path / "out")
    held = {name for name in names if native.holds(name) and model.get_submodule(name).in_features % 64 == 0}
    assert held
    assert set(kept_float(("sglang",), model, names, MXFP8)) == set(names) - held
    assert held < set(names) - set(kept_float(("sglang",), model, names))
    for name in names:
        layer, weight = result.layers[name], tensors[f"{name}.weight"]
        if name in held:
            assert words[f"{name}.weight"] == words[f"{native.name(name)}.weight"] == MXFP8
            assert torch.equal(weight.view(torch.uint8), layer.weight.view(torch.uint8))
            assert torch.equal(tensors[f"{name}.weight_scale"], layer.weight_scale)
        else:
            assert words[f"{name}.weight"] == "FLOAT"
            powers = torch.exp2(layer.weight_scale.float() - 127).repeat_interleave(32, 1)
            assert torch.equal(weight, (layer.weight.float() * powers).bfloat16())
            assert f"{name}.weight_scale" not in tensors
    added = {f"{native.name(name)}.weight" for name in linears(model) if native.holds(name)}
    assert set(words) == set(tensors) | added | {"model_quant_type"}
    assert failed(tmp_path / "out") == []


@pytest.fixture(scope="module")
def made_mxfp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = transformer("QwenImageTransformer2DModel")
    folder = tmp_path_factory.mktemp("sglang") / "out"
    written(folder, model, blocked(model), MXFP8)
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{DOWN_MLP}.weight_scale"), "is missing: ones, which stand for 2**-126"),
        (lambda t: t.update({f"{DOWN_MLP}.weight_scale": t[f"{DOWN_MLP}.weight_scale"].float()}), "cuts scales"),
        (lambda t: t.update({f"{DOWN_MLP}.weight_scale": t[f"{DOWN_MLP}.weight_scale"].view(32, -1, 2)}), "or stops"),
        (lambda t: t.update({f"{DOWN_MLP}.weight": t[f"{DOWN_MLP}.weight"].bfloat16()}), "which SGLang casts to"),
        (lambda t: t.update({f"{DOWN_MLP}.weight": t[f"{DOWN_MLP}.weight"].view(torch.int8)}), "which SGLang casts to"),
        (lambda t: t.update({f"{DOWN_MLP}.weight": t[f"{DOWN_MLP}.weight"][:, :32].contiguous()}), "no multiple of 64"),
        (lambda t: t.update({f"{DOWN_MLP}.div.mul_scale": torch.ones(128)}), f"skips {DOWN_MLP}.div.mul_scale"),
        (lambda t: t.update({f"{TO_Q}.weight": t[f"{TO_Q}.weight"].to(torch.float8_e4m3fn)}), "takes its codes for"),
    ],
)
def test_wrong_tensors_of_mxfp8_are_found(made_mxfp8, tmp_path, change, words: str):
    folder = shutil.copytree(made_mxfp8, tmp_path / "copied")
    assert failed(folder) == []
    changed(folder, change)
    assert any(words in line for line in failed(folder))
    assert not sound(check(folder), {"sglang"})


def test_a_description_that_hides_codes_is_found(made_mxfp8, tmp_path):
    folder = shutil.copytree(made_mxfp8, tmp_path / "copied")
    content = description(folder)
    rewritten(folder, content | {f"{DOWN_MLP}.weight": "FLOAT"})
    assert any("takes its codes for bfloat16 weights" in line for line in failed(folder))
    rewritten(folder, content | {f"{DOWN_MLP}.weight": "W8A8_DYNAMIC"})
    assert any("which SGLang casts to int8 codes" in line for line in failed(folder))


def test_mxfp8_for_mindie_is_judged_for_sglang_too(tmp_path):
    model = transformer("QwenImageTransformer2DModel")
    written(tmp_path / "pairs", model, blocked(model, 64), MXFP8, formats=("ascend",))
    assert failed(tmp_path / "pairs") == []
    written(tmp_path / "odd", model, blocked(model), MXFP8, formats=("ascend",))
    assert any("no multiple of 64: a RuntimeError" in line for line in failed(tmp_path / "odd"))
    assert sound(check(tmp_path / "odd"), {"ascend"})
