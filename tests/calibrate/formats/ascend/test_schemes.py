"""Ascend checkpoints of every scheme, mixed or not, smoothed or not, are written and read with the same integers."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from octavo.calibrate.formats.ascend.checkpoint import Checkpoint
from octavo.calibrate.formats.ascend.names import file_names
from octavo.calibrate.formats.ascend.read import load_ascend
from octavo.calibrate.formats.ascend.step_rows import step_rows
from octavo.calibrate.formats.export import export
from octavo.calibrate.formats.inspect import check
from octavo.calibrate.formats.target import check_target
from octavo.calibrate.layers.install import install, quantized
from octavo.calibrate.layers.modules import QuantizedLayer
from octavo.calibrate.plan import Plan
from octavo.calibrate.result import Result

from ....helpers.refusals import refused
from ....zoo.layer_kinds import EDGES, SCHEDULE, TimedToy, changed, content, frozen, layers_of, written
from ....zoo.toy import DTYPES

NAMES = ("patch", "up", "down", "out")
KINDS = ("W8A8", "W8A8_TIMESTEP", "W8A8_DYNAMIC", "W8A16")
MIXTURE = {"patch": "W8A8", "up": "W8A8_TIMESTEP", "down": "W8A8_DYNAMIC", "out": "W8A16"}


def model_and_layers(
    kinds: str | dict[str, str], dtype: torch.dtype, multiplied: bool
) -> tuple[TimedToy, dict[str, QuantizedLayer]]:
    model = TimedToy(dtype=dtype)
    layers = layers_of(model, kinds if isinstance(kinds, dict) else dict.fromkeys(NAMES, kinds))
    if multiplied:
        for name in ("patch", "up", "down"):
            module = model.get_submodule(name)
            generator = torch.Generator().manual_seed(5)
            multiplier = torch.rand(module.weight.shape[1], generator=generator) + 0.5
            layers[name] = frozen(module, layers[name].scheme, multiplier=multiplier)
    return model, layers


@pytest.mark.parametrize("multiplied", [False, True], ids=["plain", "multiplied"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kinds", [*KINDS, MIXTURE], ids=[*KINDS, "mixture"])
def test_evaluated_exported_and_loaded_are_the_same_integers_and_the_same_bytes_again(
    kinds, dtype, multiplied, tmp_path
):
    model, layers = model_and_layers(kinds, dtype, multiplied)
    one = written(tmp_path / "one", model, layers)
    loaded = load_ascend(one)
    assert {name: layer.scheme for name, layer in loaded.items()} == {n: x.scheme for n, x in layers.items()}
    for name, layer in layers.items():
        wanted, actual = layer.state_dict(), loaded[name].state_dict()
        assert set(wanted) == set(actual)
        assert all(torch.equal(wanted[key], actual[key]) and wanted[key].dtype == actual[key].dtype for key in wanted)
    x = torch.randn(2, 5, 8).to(dtype)
    for level in (900.0, 600.0, 400.0, 0.0):
        with quantized(model, layers):
            evaluated = model(x, level)
        with quantized(model, loaded):
            assert torch.equal(model(x, level), evaluated)
    steps = Checkpoint(one).levels
    assert steps == (SCHEDULE if "W8A8_TIMESTEP" in {x.scheme for x in layers.values()} else ())
    assert content(written(tmp_path / "two", model, loaded, steps)) == content(one)
    install(model, loaded)
    assert content(written(tmp_path / "three", model, loaded, steps)) == content(one)
    refused = [f"{v.consumer} {v.subject}: {v.fact}" for v in check(one) if not v.ok and v.consumer != "SGLang"]
    assert not [
        line
        for line in refused
        if "bfloat16" not in line and "not in this checkpoint" not in line and "ignores" not in line
    ]


@pytest.mark.parametrize(
    ("kinds", "word"), [(dict.fromkeys(NAMES, kind), kind) for kind in KINDS] + [(MIXTURE, "W8A8")], ids=str
)
def test_the_files_are_named_after_the_scheme_and_may_be_overwritten(kinds, word, tmp_path):
    model = TimedToy()
    folder = written(tmp_path / "out", model, layers_of(model, kinds))
    assert set(content(folder)) == {*file_names(word), "report.json"}
    description = json.loads((folder / file_names(word)[1]).read_text())
    assert description["model_quant_type"] == word
    for name, kind in kinds.items():
        assert description[f"{name}.weight"] == kind
    assert check_target(folder, overwrite=True) == folder
    assert not list(folder.glob("*_[0-9].json"))


def test_the_layout_of_timestep_rows(tmp_path):
    model, layers = model_and_layers("W8A8_TIMESTEP", torch.bfloat16, False)
    tensors = load_file(written(tmp_path / "out", model, layers) / file_names("W8A8_TIMESTEP")[0])
    layer, bins = layers["up"], [3, 3, 2, 1, 1, 0]
    wanted = {
        "input_scale": layer.input_scale[bins].bfloat16().view(6, 1),
        "input_offset": layer.input_zero_point[bins].bfloat16().view(6, 1),
        "deq_scale": layer.deq[bins],
        "quant_bias": layer.quant_bias[bins],
        "weight_scale": layer.weight_scale.view(-1, 1),
        "bias": model.up.bias,
    }
    for key, tensor in wanted.items():
        assert torch.equal(tensors[f"up.{key}"], tensor)
        assert tensors[f"up.{key}"].dtype == tensor.dtype
    half, layers = model_and_layers("W8A8_TIMESTEP", torch.float16, False)
    stored = load_file(written(tmp_path / "half", half, layers) / file_names("W8A8_TIMESTEP")[0])["up.deq_scale"]
    assert stored.dtype == torch.int64
    assert torch.equal(stored.to(torch.int32).view(torch.float32), layers["up"].deq[bins])


def test_the_layout_of_a_dynamic_layer_with_a_multiplier(tmp_path):
    model, layers = model_and_layers("W8A8_DYNAMIC", torch.bfloat16, True)
    folder = written(tmp_path / "out", model, layers)
    weights, description = (folder / name for name in file_names("W8A8_DYNAMIC"))
    tensors, words = load_file(weights), json.loads(description.read_text())
    assert {key for key in tensors if key.startswith("up.")} == {
        "up.div.mul_scale", "up.linear.weight", "up.linear.weight_scale", "up.linear.weight_offset", "up.linear.bias"
    }  # fmt: skip
    assert (tensors["up.div.mul_scale"].dtype, tensors["up.div.mul_scale"].shape) == (torch.bfloat16, (8,))
    assert words["up.linear.weight"] == "W8A8_DYNAMIC"
    assert words["up.div.mul_scale"] == words["up.linear.bias"] == "FLOAT"
    assert "up.weight" not in words
    with safe_open(weights, "pt") as opened:
        assert set(opened.metadata()) == {"format", "octavo.geometry"}


def test_without_a_schedule_there_is_one_row_for_each_bin(tmp_path):
    model, layers = model_and_layers("W8A8_TIMESTEP", torch.float32, False)
    folder = written(tmp_path / "out", model, layers, None)
    levels = Checkpoint(folder).levels
    assert step_rows(torch.tensor(EDGES), levels).bins.tolist() == [3, 2, 1, 0]
    assert content(written(tmp_path / "two", model, load_ascend(folder), None)) == content(folder)


def test_the_schedule_of_the_calibration_is_the_default(tmp_path):
    model, layers = model_and_layers("W8A8_TIMESTEP", torch.float32, False)
    result = Result(Plan(()), layers, {}, timesteps=SCHEDULE)
    assert content(export(result, model, tmp_path / "a")) == content(written(tmp_path / "b", model, layers))


@pytest.mark.parametrize("schedule", [(1000.0, 100.0), (600.0,), (100.0, 300.0, 1000.0), (999.0, 998.0)], ids=str)
def test_bins_without_a_step_are_omitted_and_every_step_has_its_bin(schedule, tmp_path):
    model, layers = model_and_layers("W8A8_TIMESTEP", torch.float32, False)
    folder = written(tmp_path / "out", model, layers, schedule)
    loaded, x = load_ascend(folder), torch.randn(2, 5, 8)
    for level in schedule:
        with quantized(model, layers):
            wanted = model(x, level)
        with quantized(model, loaded):
            assert torch.equal(model(x, level), wanted)
    assert content(written(tmp_path / "two", model, loaded, Checkpoint(folder).levels)) == content(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_a_schedule_that_is_not_finite_is_refused(value, tmp_path):
    model, layers = model_and_layers("W8A8_TIMESTEP", torch.float32, False)
    refused(lambda: written(tmp_path / "out", model, layers, (1.0, value)), 2, "timesteps: not all are finite")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["W8A8", "W8A8_TIMESTEP"])
def test_a_correction_is_reported_and_the_stored_bias_stays_the_model_s(kind, tmp_path):
    model = TimedToy()
    layers = layers_of(model, dict.fromkeys(("up", "down"), kind), correction=None)
    layers["up"] = frozen(model.up, kind, correction=torch.full((16,), 0.3, dtype=torch.float64))
    folder = written(tmp_path / "out", model, layers)
    loaded = load_ascend(folder)
    assert torch.equal(loaded["up"].bias, model.up.bias)
    assert torch.equal(loaded["up"].quant_bias, layers["up"].quant_bias)
    facts = {v.subject: v for v in check(folder) if v.consumer == "octavo"}
    assert facts["integers"].ok
    assert facts["bias corrections"].ok
    assert facts["bias corrections"].fact.startswith("1 layers have one, at most")
    changed(folder, lambda tensors: tensors["down.quant_bias"].add_(3))
    assert not next(v for v in check(folder) if v.subject == "integers").ok
    changed(folder, lambda tensors: tensors["up.quant_bias"].add_(1 << 20))
    assert not next(v for v in check(folder) if v.subject == "bias corrections").ok


def test_a_multiplier_that_the_consumer_ignores_is_reported(tmp_path):
    model, layers = model_and_layers("W8A16", torch.float32, True)
    verdicts = [v for v in check(written(tmp_path / "out", model, layers)) if v.consumer == "MindIE-SD"]
    lines = [v.fact for v in verdicts if v.subject == "multipliers"]
    assert lines == ["MindIE-SD ignores the smoothing multiplier of a W8A16 layer (down)"]


@pytest.mark.parametrize("kind", ["W8A8_DYNAMIC", "W8A16"])
def test_a_bias_that_exists_only_for_a_correction_is_reported_as_dropped(kind, tmp_path):
    model, correction = TimedToy(), torch.full((8,), 0.3, dtype=torch.float64)
    layers = {"down": frozen(model.down, kind, correction=correction), "up": frozen(model.up, kind)}
    folder = written(tmp_path / "out", model, layers)
    loaded = load_ascend(folder)
    assert torch.equal(loaded["down"].bias, correction.float())
    facts = [v.fact for v in check(folder) if v.subject == "biases"]
    assert facts == ["MindIE-SD drops the bias of a layer that has none in the float model (down)"]
    assert content(written(tmp_path / "two", model, loaded)) == content(folder)


def test_a_shared_layer_is_written_and_read_by_all_its_names(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "c": nn.Conv2d(2, 2, 3)})
    model["b"], model["d"] = model["a"], model["c"]
    layers = {"a": frozen(model["a"], "W8A8_TIMESTEP"), "c": frozen(model["c"], "W8A8")}
    loaded = load_ascend(written(tmp_path / "out", model, layers))
    assert set(loaded) == {"a", "b", "c", "d"}
    assert torch.equal(loaded["b"].edges, loaded["a"].edges)
