"""The format modelopt has the layout of ModelOpt that vLLM-Omni 0.30.0 and SGLang 0.5.23 read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from octavo.calibrate.calibration import calibrate
from octavo.calibrate.formats import format_named
from octavo.calibrate.formats.export import check_model, export, kept_float, weight_scales_for
from octavo.calibrate.formats.inspect import check, sound, views
from octavo.calibrate.formats.modelopt import rules
from octavo.calibrate.formats.modelopt.models import SGLANG, UNTHREADED, VLLM_OMNI, consumers, vllm_scale_owner
from octavo.calibrate.formats.modelopt.rules import ignored_by_sglang, ignored_by_vllm_omni
from octavo.calibrate.layers.modules import QuantizedLayer
from octavo.calibrate.layers.scheme import in_float32
from octavo.calibrate.plan import Plan
from octavo.calibrate.result import Result
from octavo.calibrate.settings import Settings

from ....helpers.refusals import refused
from ....zoo.exported_sd3 import WEIGHTS
from ....zoo.fp8_layers import fp8_layer
from ....zoo.hard_sd3 import hard
from ....zoo.image_pipelines import flux2, qwen_image, z_image
from ....zoo.pipelines import flux, wan22
from ....zoo.toy import Call, source_of

STATIC, DYNAMIC = "W8A8_FP8", "W8A8_FP8_DYNAMIC"
QWEN, FLUX, WAN, Z = (
    f"{name}Transformer{axes}DModel" for name, axes in (("QwenImage", 2), ("Flux", 2), ("Wan", 3), ("ZImage", 2))
)
PIPELINES = {QWEN: qwen_image, FLUX: flux, "Flux2Transformer2DModel": flux2, WAN: wan22, Z: z_image}
ATTENTION = "transformer_blocks.0.attn"


def transformer(kind: str) -> nn.Module:
    model: nn.Module = PIPELINES[kind]()[0].transformer.eval().requires_grad_(False).to(torch.bfloat16)
    return model


def linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def written(folder: Path, model: nn.Module, names: list[str], scheme: str = STATIC, **more: Any) -> Result:
    layers = {name: fp8_layer(model.get_submodule(name), scheme) for name in names}
    result = Result(Plan(()), layers, {})
    export(result, model, folder, ("modelopt",), **more)
    return result


def quantization(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return content


def failed(folder: Path) -> list[str]:
    return [f"{v.consumer} {v.subject}: {v.fact}" for v in check(folder) if not v.ok and v.subject != "files"]


@pytest.mark.parametrize("scheme", [STATIC, DYNAMIC])
@pytest.mark.parametrize("kind", VLLM_OMNI)
def test_layers_that_a_consumer_holds_are_fp8_and_all_others_float(tmp_path, kind, scheme):
    model = transformer(kind)
    names = linears(model)
    result = written(tmp_path / "out", model, names, scheme)
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    held = {name for name in names if any(native.holds(name) for native in consumers(kind, scheme))}
    assert 0 < len(held) < len(names)
    added = {f"{name}.weight_scale" for name in held}
    for name in names:
        layer, weight = result.layers[name], tensors[f"{name}.weight"]
        if name not in held:
            exact = in_float32(layer.weight) * layer.weight_scale.view(-1, 1)
            assert torch.equal(weight, exact.to(torch.bfloat16))
            continue
        assert torch.equal(weight.view(torch.uint8), layer.weight.view(torch.uint8))
        assert weight.dtype == torch.float8_e4m3fn
        expected = layer.weight_scale[:1] if scheme == STATIC else layer.weight_scale
        assert torch.equal(tensors[f"{name}.weight_scale"], expected)
        if scheme == STATIC:
            added.add(f"{name}.input_scale")
            assert torch.equal(tensors[f"{name}.input_scale"], layer.input_scale.view(1))
    for key in sorted(added):  # vLLM-Omni finds some scales under its own names only
        name, _, leaf = key.rpartition(".")
        again = f"{vllm_scale_owner(kind, name)}.{leaf}"
        assert torch.equal(tensors[again], tensors[key])
        added.add(again)
    assert set(tensors) == set(model.state_dict()) | added
    config = quantization(tmp_path / "out")
    assert (config["quant_method"], config["quant_type"]) == ("modelopt", "FP8")
    assert config["quant_algo"] == ("FP8" if scheme == STATIC else "FP8_PER_CHANNEL_PER_TOKEN")
    assert sound(check(tmp_path / "out"), {"modelopt"})
    alone = ["SGLang layout"] if scheme == DYNAMIC or kind == Z else []
    assert [line.partition(":")[0] for line in failed(tmp_path / "out")] == alone


@pytest.mark.parametrize("kind", VLLM_OMNI)
def test_every_consumer_finds_the_float_layers_and_no_other_in_ignore(tmp_path, kind):
    model = transformer(kind)
    names = linears(model)
    left = [name for name in names if not name.endswith(("to_k", "add_q_proj", "net.2", "linear_out", "w2", "_mod.1"))]
    written(tmp_path / "out", model, [name for name in left if "transformer_blocks.0.attn.to_q" not in name])
    entries = quantization(tmp_path / "out")["ignore"]
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    codes = {name for name in names if tensors[f"{name}.weight"].dtype == torch.float8_e4m3fn}
    assert codes
    for name in names:
        assert VLLM_OMNI[kind].holds(name) is False or ignored_by_vllm_omni(kind, name, entries) == (name not in codes)
        if kind != Z:
            assert ignored_by_sglang(kind, name, entries) == (name not in codes), name
            own = SGLANG[kind].name(name)
            assert name in codes or {own, f"{own}*"} & set(entries)
        assert name in codes or {name, f"{name}*"} & set(entries)
    assert sound(check(tmp_path / "out"), {"modelopt"})


def test_names_that_are_part_of_others_match_from_the_beginning_only(tmp_path):
    model = transformer(FLUX)
    single = "single_transformer_blocks.0"
    written(
        tmp_path / "out", model, [f"{single}.{leaf}" for leaf in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_out")]
    )
    entries = quantization(tmp_path / "out")["ignore"]
    assert {"proj_out*", f"{ATTENTION}.to_q*", f"{ATTENTION}.to_k*", f"{ATTENTION}.to_qkv*"} <= set(entries)
    assert f"{single}.proj_mlp" in entries
    plain = [entry.removesuffix("*") for entry in entries]
    assert ignored_by_vllm_omni(FLUX, f"{single}.proj_out", plain)  # what the * prevents
    assert failed(tmp_path / "out") == []
    assert not any(v.subject == "ignore" for v in check(tmp_path / "out"))


def test_layers_with_the_same_input_have_the_same_scale_and_else_the_largest_is_written(tmp_path):
    model = transformer(QWEN)
    layers = {name: fp8_layer(model.get_submodule(name), STATIC) for name in linears(model)}
    layers[f"{ATTENTION}.to_k"] = fp8_layer(model.get_submodule(f"{ATTENTION}.to_k"), STATIC, 0.02)
    export(Result(Plan(()), layers, {}), model, tmp_path / "out", ("modelopt",))
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    for leaf in "qkv":
        assert torch.equal(tensors[f"{ATTENTION}.to_{leaf}.input_scale"], torch.tensor([0.02]))
        assert not torch.equal(tensors[f"{ATTENTION}.add_{leaf}_proj.input_scale"], torch.tensor([0.02]))


@pytest.mark.parametrize("more", [{}, {"smoothing": True}, {"weights": ("easy-quant",)}, {"observer": "mse"}])
def test_calibration_gives_layers_with_the_same_input_the_same_scale(more):
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.norm = nn.LayerNorm(8)
            self.to_q, self.to_k, self.to_v = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            x = self.norm(hidden)
            return self.to_q(x) * self.to_k(x) + self.to_v(x)

    model = Joined().eval().requires_grad_(False)
    settings = Settings(defaults={}, sqnr_calls=0, element="fp8", weight_scales="tensor", **more)
    runs = [Call((torch.randn(2, 6, 8),), {}, step) for step in range(4)]
    layers = calibrate(model, source_of(runs), settings).layers
    assert len({float(layers[name].input_scale) for name in ("to_q", "to_k", "to_v")}) == 1


def test_folded_factors_and_several_files(tmp_path):
    model = transformer(QWEN)
    result = written(tmp_path / "out", model, linears(model))
    name = f"{ATTENTION}.norm_q.weight"
    folded = model.get_parameter(name) * 2
    result.parameters[name] = lambda: folded
    export(result, model, tmp_path / "split", ("modelopt",), max_shard_size="20KB")
    files = sorted((tmp_path / "split").glob("*.safetensors"))
    joined = {name: tensor for path in files for name, tensor in load_file(path).items()}
    whole = load_file(tmp_path / "out" / WEIGHTS)
    assert len(files) > 2
    assert torch.equal(joined.pop(name), folded)
    assert all(torch.equal(joined[key].float(), whole[key].float()) for key in joined)
    assert joined.keys() == whole.keys() - {name}
    assert failed(tmp_path / "split") == []


def test_inspect_describes_it(tmp_path):
    model = transformer(WAN)
    written(tmp_path / "out", model, linears(model))
    assert views(tmp_path / "out") == {"modelopt": tmp_path / "out"}
    describe = format_named("modelopt").describe
    assert describe is not None
    assert describe(tmp_path / "out").title.startswith("a WanTransformer3DModel in the layout of ModelOpt")
    assert set(describe(tmp_path / "out").schemes) == {STATIC}


def test_layers_that_no_consumer_holds_stay_float_from_the_start():
    model = transformer(FLUX)
    names = linears(model)
    kept = kept_float(("modelopt",), model, names)
    assert f"{ATTENTION}.to_q" not in kept  # SGLang holds it
    assert "transformer_blocks.0.ff.net.2" in kept
    single = "single_transformer_blocks.0.attn"
    without = kept_float(("modelopt",), model, [name for name in names if name != f"{single}.to_k"])
    assert set(without) - set(kept) == {f"{single}.to_q", f"{single}.to_v"}  # vLLM-Omni joins the three
    assert f"{ATTENTION}.to_q" in rules.kept_float(model, names, DYNAMIC)


def test_what_the_consumers_cannot_hold_is_refused_in_one_line(tmp_path):
    def refusal(model: nn.Module, layer: QuantizedLayer, name: str, words: str) -> None:
        refused(lambda: export(Result(Plan(()), {name: layer}, {}), model, tmp_path / "out", ("modelopt",)), 2, words)
        assert not (tmp_path / "out").exists()

    name, model = f"{ATTENTION}.to_q", transformer(QWEN)
    module = model.get_submodule(name)
    refusal(model, fp8_layer(module, STATIC, per_tensor=False), name, "Use --weight-scales tensor, or")
    both = {name: fp8_layer(module, STATIC), f"{ATTENTION}.to_k": fp8_layer(module, DYNAMIC)}
    refused(lambda: export(Result(Plan(()), both, {}), model, tmp_path / "out", ("modelopt",)), 2, "with one of them")
    refused(lambda: check_model(("modelopt",), hard()), 2, "none would compute in FP8. Use --format diffusers, or")
    assert weight_scales_for(("modelopt",), STATIC, None) == "tensor"
    assert weight_scales_for(("modelopt",), DYNAMIC, None) == "channel"
    record = format_named("modelopt")
    assert all("FP8" in str(record.refusal(kind, {})) for kind in UNTHREADED)
    assert all(record.refusal(kind, {}) is None for kind in VLLM_OMNI)
    assert "has no list of the layers" in str(record.refusal("NewTransformer2DModel", {}))
