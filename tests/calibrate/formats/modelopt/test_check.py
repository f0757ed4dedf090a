"""`octavo inspect` finds what vLLM-Omni 0.30.0 and SGLang 0.5.23 would read wrongly in ModelOpt's FP8 files, also in
those of other tools."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from octavo.calibrate.formats.export import export
from octavo.calibrate.formats.inspect import check, sound
from octavo.calibrate.plan import Plan
from octavo.calibrate.result import Result

from ....zoo.exported_sd3 import reconfigured
from ....zoo.fp8_layers import fp8_layer
from ....zoo.image_pipelines import qwen_image, z_image
from ....zoo.layer_kinds import changed, unlisted
from ....zoo.pipelines import wan22

STATIC, DYNAMIC = "W8A8_FP8", "W8A8_FP8_DYNAMIC"
PIPELINES = {"qwen": qwen_image, "wan": wan22, "z": z_image}
BLOCK = "transformer_blocks.0"
TO_Q, MOD, DOWN = f"{BLOCK}.attn.to_q", f"{BLOCK}.img_mod.1", f"{BLOCK}.img_mlp.net.2"
JOINED = {
    "attention.to_qkv": ["attention.to_q", "attention.to_k", "attention.to_v"],
    "feed_forward.w13": ["feed_forward.w1", "feed_forward.w3"],
}
FFN, OWN_FFN = "blocks.0.ffn.net.2", "blocks.0.ffn.net_2"
Change = Callable[[dict[str, Tensor]], object]


@pytest.fixture(scope="module", params=[("qwen", STATIC)], ids=["qwen"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("modelopt") / "out", *request.param)


def written(folder: Path, family: str, scheme: str, without: tuple[str, ...] = (MOD,)) -> Path:
    """Writes all linear layers of a tiny model but those `without`."""
    model = PIPELINES[family]()[0].transformer.eval().requires_grad_(False).to(torch.bfloat16)
    linears = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    layers = {name: fp8_layer(layer, scheme) for name, layer in linears.items() if name not in without}
    return export(Result(Plan(()), layers, {}), model, folder, ("modelopt",))


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "copied")


def failed(folder: Path, consumer: str) -> list[str]:
    return [f"{v.subject}: {v.fact}" for v in check(folder) if not v.ok and v.consumer == consumer]


@pytest.mark.parametrize(
    ("change", "omni", "sglang"),
    [
        (lambda t: t.pop(f"{TO_Q}.weight_scale"), "smallest float32 number", "computes with the scale 1"),
        (lambda t: t.pop(f"{TO_Q}.input_scale"), "smallest float32 number", "computes with the scale 1"),
        (lambda t: t.update({f"{TO_Q}.weight_scale": torch.tensor(0.1)}), "", "to_q.weight_scale is float32 [], not"),
        (lambda t: t.update({f"{DOWN}.weight_scale": torch.tensor(0.1)}), "", ""),
        (lambda t: t.update({f"{TO_Q}.weight_scale": torch.ones(32)}), "is float32 [32]", "is float32 [32]"),
        (lambda t: t.update({f"{TO_Q}.input_scale": torch.ones(1).bfloat16()}), "is bfloat16 [1]", "is bfloat16 [1]"),
        (lambda t: t.update({f"{DOWN}.weight": t[f"{DOWN}.weight"].bfloat16()}), "takes its weight", "the scale 1"),
        (lambda t: t.update({f"{DOWN}.pre_quant_scale": torch.ones(64)}), "has no place", "skips"),
        (lambda t: t.update({f"{DOWN}.input_quantizer._amax": torch.ones(1)}), "has no place", "skips"),
        (lambda t: t.update({f"{MOD}.weight": t[f"{MOD}.weight"].to(torch.float8_e4m3fn)}),
         "holds the layer as float and stops", "takes its codes for weights, without a warning"),
    ],
)  # fmt: skip
def test_wrong_tensors_are_found(copied: Path, change: Change, omni: str, sglang: str):
    changed(copied, change)
    for consumer, words in (("vLLM-Omni", omni), ("SGLang", sglang)):
        lines = failed(copied, consumer)
        assert any(words in line for line in lines) if words else not lines, lines
    assert sound(check(copied), {"modelopt"}) == (not omni and not sglang)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t[f"{TO_Q}.weight"].view(torch.uint8).fill_(0xFF), "has codes that are NaN"),
        (lambda t: t[f"{TO_Q}.weight_scale"].zero_(), "weight_scale is not positive and finite"),
        (lambda t: t[f"{TO_Q}.input_scale"].fill_(float("inf")), "input_scale is not positive and finite"),
    ],
)
def test_wrong_numbers_are_found(copied: Path, change: Change, words: str):
    changed(copied, change)
    assert any(words in line for line in failed(copied, "octavo"))
    assert not sound(check(copied), {"modelopt"})


def _without(*names: str) -> Callable[[dict[str, Any]], object]:
    return lambda q: q.update(ignore=[entry for entry in q["ignore"] if entry not in names])


@pytest.mark.parametrize(
    ("change", "omni", "sglang"),
    [
        (_without(f"{BLOCK}.img_mod"), "", f"lacks SGLang's name {BLOCK}.img_mod"),  # only diffusers' name is left
        (_without(MOD), "", ""),
        (lambda q: q["ignore"].append(TO_Q), "", "only some of the layers that SGLang joins"),
        (lambda q: q["ignore"].extend(f"{BLOCK}.attn.to_{leaf}" for leaf in "qkv"), "", ""),
        (lambda q: q["ignore"].append("transformer_blocks.*.img_m*"), "", ""),
        (lambda q: q.update(ignore=None), "", "img_mod"),
        (lambda q: q.update(ignore="img_mod"), "is not a list", "is not a list"),
        (lambda q: q.update(quant_algo="NVFP4"), "quant_algo is NVFP4", "quant_algo is NVFP4"),
        (lambda q: q.update(quantization={"quant_algo": q.pop("quant_algo"), "exclude_modules": q.pop("ignore")}),
         "", ""),
    ],
)  # fmt: skip
def test_wrong_settings_are_found(copied: Path, change: Callable[[dict[str, Any]], object], omni: str, sglang: str):
    reconfigured(copied, lambda config: change(config["quantization_config"]))
    for consumer, words in (("vLLM-Omni", omni), ("SGLang", sglang)):
        lines = failed(copied, consumer)
        assert any(words in line for line in lines) if words else not lines, lines
    assert sound(check(copied), {"modelopt"}) == (not omni and not sglang)


def test_other_declarations_that_sglang_would_read_are_found(copied):
    (copied / "quant_model_description.json").write_text("{}")
    assert any("takes quant_model_description.json in place" in line for line in failed(copied, "SGLang"))
    (copied / "quant_model_description.json").unlink()
    same = json.loads((copied / "config.json").read_text())["quantization_config"]
    changed(copied, lambda tensors: None, {"quantization_config": json.dumps(same)})
    assert failed(copied, "SGLang") == []
    changed(copied, lambda tensors: None, {"quantization_config": json.dumps(same | {"ignore": []})})
    assert any("ignore differs in the metadata" in line for line in failed(copied, "SGLang"))
    assert failed(copied, "vLLM-Omni") == []


def test_what_stays_float_and_what_is_rounded_again_is_said(copied):
    def facts() -> list[str]:
        return [v.fact for v in check(copied) if v.ok and v.consumer == "vLLM-Omni"]

    changed(copied, lambda tensors: [t.fill_(0.5) for key, t in tensors.items() if key.endswith("weight_scale")])
    assert not any("rounds their codes again" in fact or "stay float" in fact for fact in facts())
    changed(copied, lambda tensors: tensors[f"{TO_Q}.weight_scale"].mul_(2))
    assert any("to_qkv, and rounds their codes again" in fact for fact in facts())
    reconfigured(copied, lambda config: config["quantization_config"]["ignore"].append("0.img_mlp"))
    assert any("2 FP8 layers stay float, such as transformer_blocks.0.img_mlp" in fact for fact in facts())


def test_models_that_nothing_computes_in_fp8_are_named(copied):
    reconfigured(copied, lambda config: config.update(_class_name="SD3Transformer2DModel"))
    for consumer in ("vLLM-Omni", "SGLang"):
        assert any(line.startswith("model: neither") for line in failed(copied, consumer))
    assert not sound(check(copied), {"modelopt"})


def test_rows_are_for_vllm_omni_alone(tmp_path):
    folder = written(tmp_path / "out", "qwen", DYNAMIC)
    assert failed(folder, "vLLM-Omni") == []
    (line,) = failed(folder, "SGLang")
    assert "with a ValueError. Calibrate with --activations static" in line
    assert sound(check(folder), {"modelopt"})
    changed(folder, lambda tensors: tensors.update({f"{TO_Q}.weight_scale": torch.ones(1)}))
    assert any("is float32 [1], not float32 [32]" in line for line in failed(folder, "vLLM-Omni"))
    assert not sound(check(folder), {"modelopt"})


def native_scales(tensors: dict[str, Tensor]) -> None:
    """Renames the scales of joined layers of Z-Image to SGLang's names, with a scale for each part."""
    for key in [key for key in tensors if key.endswith("attention.to_q.weight_scale")]:
        block = key.removesuffix(".attention.to_q.weight_scale")
        for leaf in ("weight_scale", "input_scale"):
            for own, members in JOINED.items():
                if f"{block}.{members[0]}.{leaf}" in tensors:
                    scales = [tensors.pop(f"{block}.{member}.{leaf}") for member in members]
                    tensors[f"{block}.{own}.{leaf}"] = torch.cat(scales)


def test_z_image_is_for_one_consumer_at_a_time(tmp_path):
    folder = written(tmp_path / "out", "z", STATIC)
    assert failed(folder, "vLLM-Omni") == []
    assert any("it would put out noise" in line for line in failed(folder, "SGLang"))
    assert sound(check(folder), {"modelopt"})
    changed(folder, native_scales)
    assert failed(folder, "SGLang") == []
    assert any("with which vLLM-Omni stops" in line for line in failed(folder, "vLLM-Omni"))
    assert sound(check(folder), {"modelopt"})
    changed(folder, lambda tensors: tensors.pop("layers.0.feed_forward.w13.weight_scale"))
    assert any("w13.weight_scale is missing" in line for line in failed(folder, "SGLang"))
    assert not sound(check(folder), {"modelopt"})


def test_the_feed_forward_of_wan_needs_scales_under_both_names(tmp_path):
    folder = written(tmp_path / "out", "wan", STATIC)
    assert failed(folder, "vLLM-Omni") == failed(folder, "SGLang") == []
    changed(folder, lambda tensors: tensors.pop(f"{OWN_FFN}.weight_scale"))
    assert any("skips the scale under the name of diffusers" in line for line in failed(folder, "vLLM-Omni"))
    assert failed(folder, "SGLang") == []
    assert not sound(check(folder), {"modelopt"})
    changed(folder, lambda t: (t.update({f"{OWN_FFN}.weight_scale": torch.ones(1)}), t.pop(f"{FFN}.weight_scale")))
    assert any(f"{FFN}.weight_scale is missing" in line for line in failed(folder, "SGLang"))
    reconfigured(folder, lambda config: config["quantization_config"]["ignore"].append("blocks.1.ffn"))
    assert any("takes its FP8 codes for weights, without a warning" in line for line in failed(folder, "vLLM-Omni"))


@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_damaged_files_give_negative_verdicts(copied, name):
    unlisted(copied)
    (copied / name).unlink()
    (copied / name).write_text("{")
    assert not sound(check(copied), {"modelopt"})
