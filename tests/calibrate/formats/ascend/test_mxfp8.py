"""W8A8_MXFP8 layers are written as MindIE-SD reads them and read unchanged, and `octavo inspect` finds what MindIE-SD
cannot run and what no export writes, also in files of msModelSlim."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from octavo.calibrate.formats import format_named
from octavo.calibrate.formats.ascend.names import file_names
from octavo.calibrate.formats.ascend.read import AscendLayers, load_ascend
from octavo.calibrate.formats.export import kept_float
from octavo.calibrate.formats.inspect import check, sound
from octavo.calibrate.formats.target import check_target
from octavo.calibrate.layers.install import install, quantized
from octavo.calibrate.layers.modules import QuantizedLayer, build

from ....helpers import npu_mx_standin
from ....helpers.refusals import refused
from ....zoo.layer_kinds import changed, content, frozen, unlisted, written
from ....zoo.toy import DTYPES

MXFP8 = "W8A8_MXFP8"
WEIGHTS, DESCRIPTION = file_names(MXFP8)


class Wide(nn.Module):
    """Three linears, of which the second has an odd number of blocks and the third has no bias."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.bare = nn.Linear(64, 96), nn.Linear(96, 64), nn.Linear(64, 32, bias=False)
        self.to(dtype).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.bare(self.down(nn.functional.silu(self.up(x))))


def layers_of(model: Wide, *names: str, **options: Any) -> dict[str, QuantizedLayer]:
    return {name: frozen(model.get_submodule(name), MXFP8, clamping=True, **options) for name in names}


def failed(folder: Path, consumer: str = "MindIE-SD") -> list[str]:
    return [f"{v.subject}: {v.fact}" for v in check(folder) if not v.ok and v.consumer == consumer]


def described(folder: Path) -> dict[str, str]:
    words: dict[str, str] = json.loads((folder / DESCRIPTION).read_text())
    return words


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_layout(dtype, tmp_path):
    model = Wide(dtype)
    layers = layers_of(model, "up", "down")
    folder = written(tmp_path / "out", model, layers)
    assert set(content(folder)) == {WEIGHTS, DESCRIPTION, "report.json"}
    tensors, words = load_file(folder / WEIGHTS), described(folder)
    assert words == {
        "model_quant_type": MXFP8, "up.weight": MXFP8, "up.weight_scale": MXFP8, "up.bias": "FLOAT",
        "down.weight": MXFP8, "down.weight_scale": MXFP8, "down.bias": "FLOAT", "bare.weight": "FLOAT",
    }  # fmt: skip
    assert set(tensors) == set(words) - {"model_quant_type"}
    for name, blocks in (("up", 2), ("down", 3)):
        weight, scale, bias = (tensors[f"{name}.{key}"] for key in ("weight", "weight_scale", "bias"))
        assert (weight.dtype, scale.dtype, bias.dtype) == (torch.float8_e4m3fn, torch.uint8, torch.float32)
        assert torch.equal(weight.view(torch.uint8), layers[name].weight.view(torch.uint8))
        assert torch.equal(scale, layers[name].weight_scale)
        assert scale.shape == (len(weight), blocks)
        assert torch.equal(bias, model.get_submodule(name).bias.float())
    assert failed(folder) == failed(folder, "octavo") == []
    assert sound(check(folder), {"ascend"})
    facts = [v.fact for v in check(folder) if (v.consumer, v.subject) == ("octavo", "codes")]
    assert [fact.startswith("computed in float32, ") for fact in facts] == [True]
    assert check_target(folder, overwrite=True) == folder
    describe = format_named("ascend").describe
    assert describe is not None
    assert describe(folder).schemes == {MXFP8: 2, "FLOAT": 1}


@pytest.mark.parametrize("multiplied", [False, True], ids=["plain", "multiplied"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_read_with_the_same_numbers_and_written_with_the_same_bytes(dtype, multiplied, tmp_path):
    model = Wide(dtype)
    layers = layers_of(model, "up", "down", "bare")
    if multiplied:
        layers |= layers_of(model, "up", "bare", multiplier=torch.rand(64) + 0.5)
    one = written(tmp_path / "one", model, layers)
    with safe_open(one / WEIGHTS, "pt") as file:
        assert ("up.div.mul_scale" in file.keys()) == multiplied  # noqa: SIM118
    loaded = load_ascend(one)
    assert loaded.keys() == layers.keys()
    for name, layer in layers.items():
        wanted, actual = layer.state_dict(), loaded[name].state_dict()
        assert (loaded[name].scheme, loaded[name].dtype) == (MXFP8, dtype)
        assert wanted.keys() == actual.keys()
        for key, value in wanted.items():
            assert (actual[key].dtype, actual[key].shape) == (value.dtype, value.shape)
            assert torch.equal(actual[key].float(), value.float())
    x = torch.randn(2, 5, 64).to(dtype)
    with quantized(model, layers):
        wanted = model(x)
    with quantized(model, loaded):
        assert torch.equal(model(x), wanted)
    assert AscendLayers(one).difference(model) is None
    assert content(written(tmp_path / "two", model, loaded)) == content(one)
    install(model, loaded)
    assert content(written(tmp_path / "three", model, loaded)) == content(one)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["up", "down"])
def test_a_layer_computes_what_ascend_s_operators_do(name, dtype):
    model = Wide(dtype)
    layer = layers_of(model, name)[name]
    x = (torch.randn(33, layer.weight.shape[1]) * torch.exp2(torch.randint(-6, 6, (33, 1)))).to(dtype)
    codes, scales = npu_mx_standin.dynamic_mx_quant(x, dst_type=torch.float8_e4m3fn)
    weight_scale = nn.functional.pad(layer.weight_scale, (0, layer.weight_scale.shape[1] % 2))
    y = npu_mx_standin.mx_quant_matmul(
        codes, layer.weight.t(), weight_scale.view(len(weight_scale), -1, 2).transpose(0, 1), pertoken_scale=scales,
        bias=layer.bias.float(), output_dtype=dtype, scale_dtype=npu_mx_standin.EXPONENT8,
        pertoken_scale_dtype=npu_mx_standin.EXPONENT8, group_sizes=[1, 1, 32],
    )  # fmt: skip
    assert torch.equal(layer(x), y)
    assert not torch.equal(frozen(model.get_submodule(name), MXFP8)(x), y)  # scales chosen in the other way


@pytest.mark.parametrize("kind", ["W8A8", "W8A8_DYNAMIC", "W8A16", MXFP8])
def test_a_corrected_bias_is_no_difference_from_the_float_model(kind, tmp_path):
    model = Wide()
    correction = torch.full((96,), 0.05, dtype=torch.float64)
    folder = written(tmp_path / "out", model, {"up": frozen(model.up, kind, clamping=True, correction=correction)})
    assert AscendLayers(folder).difference(model) is None
    model.down.bias += 1
    assert AscendLayers(folder).difference(model) == "down.bias has other values"


def test_layers_without_a_bias_stay_float_in_this_scheme_only():
    model, names = Wide(), ["up", "down", "bare"]
    assert set(kept_float(("ascend",), model, names, MXFP8)) == {"bare"}
    assert kept_float(("ascend",), model, names, "W8A8_DYNAMIC") == kept_float(("ascend",), model, names) == {}
    assert kept_float(("diffusers",), model, names, MXFP8) == {}


def test_a_layer_without_a_bias_can_be_written_and_has_a_negative_verdict(tmp_path):
    model = Wide()
    folder = written(tmp_path / "out", model, layers_of(model, "up", "bare"))
    assert any("bare has no bias: MindIE-SD ends in an AttributeError" in line for line in failed(folder))
    assert failed(folder, "octavo") == []
    assert not sound(check(folder), {"ascend"})


def test_several_schemes_are_described_layer_by_layer(tmp_path):
    model = Wide()
    layers = layers_of(model, "up") | {"down": frozen(model.down, "W8A8_DYNAMIC"), "bare": frozen(model.bare, "W8A16")}
    folder = written(tmp_path / "out", model, layers)
    loaded = load_ascend(folder)
    assert {name: layer.scheme for name, layer in loaded.items()} == {
        "up": MXFP8, "down": "W8A8_DYNAMIC", "bare": "W8A16"
    }  # fmt: skip
    x = torch.randn(3, 64).bfloat16()
    assert torch.equal(loaded["up"](x), layers["up"](x))
    assert failed(folder) == failed(folder, "octavo") == []


def test_files_of_msmodelslim_are_read(tmp_path):
    """They have no metadata of Octavo's, and biases that bfloat16 does not hold."""
    model = Wide()
    layer = layers_of(model, "down")["down"]
    folder = tmp_path / "slim"
    folder.mkdir(0o750)
    bias = torch.randn(64)
    tensors = {"down.weight": layer.weight.data, "down.weight_scale": layer.weight_scale, "down.bias": bias}
    save_file(tensors, folder / WEIGHTS)
    words = {"model_quant_type": MXFP8, "down.bias": "FLOAT"} | dict.fromkeys(
        ("down.weight", "down.weight_scale"), MXFP8
    )
    (folder / DESCRIPTION).write_text(json.dumps(words))
    for path in folder.iterdir():
        path.chmod(0o640)
    loaded = load_ascend(folder)["down"]
    assert torch.equal(loaded.bias, bias)
    x = torch.randn(5, 96)
    assert torch.equal(loaded(x), build(replace(layer.numbers, bias=bias), model.down)(x))
    assert failed(folder) == failed(folder, "octavo") == []


def put(key: str, value: int) -> Callable[[dict[str, Tensor]], object]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[key].view(torch.uint8).view(-1)[3] = value

    return change


def cast(key: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({key: make(tensors[key]).contiguous()})


DAMAGE = [
    (put("up.weight", 0x7F), "up.weight holds NaN"),
    (put("up.weight", 0xFF), "up.weight holds NaN"),
    (put("up.weight_scale", 255), "up.weight_scale holds 255"),
    (lambda t: t.pop("up.weight"), "up.weight is missing"),
    (lambda t: t.pop("up.weight_scale"), "up.weight_scale is missing"),
    (cast("up.weight_scale", lambda scale: scale[:, :1]), "up.weight_scale is uint8 [96, 1]"),
    (cast("up.weight_scale", lambda scale: scale.view(96, 1, 2)), "up.weight_scale is uint8 [96, 1, 2]"),
    (cast("up.weight_scale", lambda scale: scale.float()), "up.weight_scale is float32"),
    (cast("up.weight", lambda weight: weight.view(torch.int8)), "up.weight is int8"),
    (cast("up.weight", lambda weight: weight[:, :40]), "up.weight has shape (96, 40)"),
    (cast("up.bias", lambda bias: bias[:5]), "up.bias is float32 [5]"),
    (cast("up.bias", lambda bias: bias * float("nan")), "up.bias is not finite"),
]


@pytest.mark.parametrize(("change", "fact"), DAMAGE, ids=[f"{n}-{fact}" for n, (_, fact) in enumerate(DAMAGE)])
def test_what_no_export_writes_is_refused(change, fact, tmp_path):
    model = Wide()
    folder = written(tmp_path / "out", model, layers_of(model, "up"))
    changed(folder, change)
    refused(lambda: load_ascend(folder), 3, fact)
    assert failed(folder, "octavo")
    if not any(word in fact for word in ("holds", "finite", "(96, 40)")):
        assert any(fact in line for line in failed(folder))


def test_numbers_beyond_float32_are_found(tmp_path):
    model = Wide()
    folder = written(tmp_path / "out", model, layers_of(model, "up"))
    changed(folder, cast("up.weight_scale", lambda scale: torch.full_like(scale, 254)))
    assert any("the largest error is inf" in line for line in failed(folder, "octavo"))


def test_mindie_casts_float_weights_and_pads_an_odd_number_of_blocks(tmp_path):
    model = Wide()
    folder = written(tmp_path / "out", model, layers_of(model, "down"))
    changed(folder, cast("down.weight", lambda weight: weight.to(torch.bfloat16)))
    assert failed(folder) == []
    assert failed(folder, "octavo")


def test_an_unknown_scheme_is_refused(tmp_path):
    model = Wide()
    folder = written(tmp_path / "out", model, layers_of(model, "up"))
    words = described(folder)
    unlisted(folder)
    (folder / DESCRIPTION).unlink()
    (folder / DESCRIPTION).write_text(json.dumps(words | {"model_quant_type": "W8A16_MXFP8"}))
    refused(lambda: load_ascend(folder), 3, "W8A8_MXFP8")
