"""Weights and biases that make up for rounding: never worse on calls held out, and exported as they were judged."""

import json
from functools import cache
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from octavo.calibrate.choice import NEAREST, Choice, layer_of
from octavo.calibrate.formats.ascend.read import load_ascend
from octavo.calibrate.formats.export import export
from octavo.calibrate.layers.inputs import StaticInput
from octavo.calibrate.layers.install import quantized
from octavo.calibrate.layers.scheme import ACTIVATION, qparams_of
from octavo.calibrate.observers.survey import Survey
from octavo.calibrate.plan import layer_at
from octavo.calibrate.replay.sqnr import Power, comparing, outputs
from octavo.calibrate.replay.work import Work
from octavo.calibrate.rounding.choose_weights import choose_weights
from octavo.calibrate.rounding.judge import error_of
from octavo.calibrate.rounding.methods import WEIGHT_METHODS, Method
from octavo.calibrate.settings import RECIPES

from ...zoo.hard_sd3 import FEW, Call, bits, calibrated, hard, prompts, same, sqnr
from ..observers.test_survey import survey_inputs

METHODS = [name for name in WEIGHT_METHODS if name != NEAREST]


@cache
def known() -> tuple[torch.nn.Module, list[Call], dict[str, Survey], dict[str, Choice]]:
    """A model, calls of which none is held out, what is known of the inputs, and choices that round to the nearest."""
    model, samples = hard(outliers=0), prompts(8, 2)
    surveys, current = survey_inputs(model, samples)
    surveys = {name: each for name, each in surveys.items() if each.has_input and "blocks.0" in name}
    extents = {name: each.all.range() for name, each in surveys.items()}
    training = [samples[at] for at in current.training]
    choices = {}
    for name, extent in extents.items():
        qparams = qparams_of(extent, ACTIVATION, torch.float32)
        assert qparams is not None
        choices[name] = Choice(StaticInput(qparams))
    return model, training, surveys, choices


@cache
def found(*weights: str, correct: bool = False) -> dict[str, Choice]:
    model, training, surveys, choices = known()
    return choose_weights(model, choices, surveys, lambda: training, Method(weights, FEW, correct), Work())


@pytest.mark.parametrize("correct", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_no_layer_is_worse_on_rows_held_out_and_its_choice_says_by_which_method(method, correct):
    model, _, surveys, choices = known()
    made = found(method, correct=correct)
    assert made.keys() == choices.keys()
    for name, choice in made.items():
        module, rows = layer_at(model, name), surveys[name].judge_sample
        assert error_of(module, choice, rows) <= error_of(module, choices[name], rows)
        assert choice.method == (NEAREST if choice.weight is None else method)
        assert choice.input is choices[name].input or method == "easy-quant"
    assert any(choice.weight is not None for choice in made.values())


def test_of_several_methods_each_layer_takes_the_best():
    model, _, surveys, _ = known()
    made = [found("easy-quant"), found("gptq"), found("easy-quant", "gptq")]
    for name in made[-1]:
        errors = [error_of(layer_at(model, name), each[name], surveys[name].judge_sample) for each in made]
        assert errors[-1] == min(errors)


def test_easy_quant_clips_the_input_where_outliers_cost_most_unless_it_is_smoothed():
    model, samples, held = hard(), prompts(8, 2), prompts(2, 3, seed=50)
    for smoothing in (False, True):
        plain, made = (
            calibrated(model, samples, smoothing=smoothing, weights=weights).layers for weights in ((), ("easy-quant",))
        )
        changed = [name for name in made if not torch.equal(made[name].input_scale, plain[name].input_scale)]
        if smoothing:
            assert not [name for name in changed if plain[name].mul_scale is not None]
        else:
            assert changed
            assert all(made[name].input_scale < plain[name].input_scale for name in changed)
            assert sqnr(model, made, held) > sqnr(model, plain, held) + 1


def test_the_report_says_which_method_and_where_it_did_not_help():
    report = calibrated(hard(), prompts(4, 1), weights=("easy-quant",), bias_correction=True).report
    rows = [row for row in report["layers"] if row["scheme"]]
    assert {row["weights"] for row in rows} <= {NEAREST, "easy-quant"}
    assert all(("note" in row) == (row["weights"] == NEAREST) for row in rows)
    assert any(row["corrected"] for row in rows)
    assert report["settings"]["weights"] == ["easy-quant"]


def test_a_correction_lowers_the_mean_error_seen_and_unseen():
    model, training, surveys, choices = known()
    corrected = found(correct=True)
    names = [name for name, choice in corrected.items() if choice.correction is not None and surveys[name].has_tokens]
    assert len(names) > 3
    for samples in (training, prompts(4, 5, seed=60)):
        plain, better = (mean_errors(model, {n: each[n] for n in names}, samples) for each in (choices, corrected))
        assert sum(better.values()) < 0.5 * sum(plain.values())


def mean_errors(model: torch.nn.Module, choices: dict[str, Choice], samples: list[Call]) -> dict[str, float]:
    """The square of the mean error of each channel, summed over channels, by layer, of its mean square output."""
    errors: dict[str, list[torch.Tensor]] = {}

    def hook_for(name: str) -> Any:
        layer = layer_of(layer_at(model, name), choices[name])

        def hear(module: Any, args: Any, output: torch.Tensor) -> None:
            errors.setdefault(name, []).append(
                (layer(args[0]) - output).flatten(0, -2).double() / output.square().mean().sqrt()
            )

        return hear

    hooks = [layer_at(model, name).register_forward_hook(hook_for(name)) for name in choices]
    outputs(model, samples)
    for hook in hooks:
        hook.remove()
    return {name: float(torch.cat(each).mean(0).square().sum()) for name, each in errors.items()}


def test_the_sums_of_one_layer_at_a_time_give_the_same_bits():
    model, training, surveys, choices = known()
    replays = 0

    def calls() -> list[Call]:
        nonlocal replays
        replays += 1
        return training[:4]

    method = Method(("gptq",), {}, True)
    whole = choose_weights(model, choices, surveys, calls, method, Work())
    assert replays == 1
    apart = choose_weights(model, choices, surveys, calls, method, Work(), sums_bytes=1)
    assert replays > 5
    for name, choice in whole.items():
        assert choice.method == apart[name].method
        assert same(
            layer_of(layer_at(model, name), choice).state_dict(),
            layer_of(layer_at(model, name), apart[name]).state_dict(),
        )


def test_again_the_same_bits_and_the_model_as_it_was():
    model, samples = hard(), prompts(4, 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = RECIPES["best"] | {"weights": ("adaround",)}
    one, other = (bits(calibrated(model, samples, **settings).layers) for _ in range(2))
    assert same(one, other)
    assert same(before, model.state_dict())


@pytest.mark.parametrize("activations", ["static", "timestep", "dynamic", "float"])
def test_exported_integers_are_those_that_were_measured(tmp_path, activations):
    model, samples = hard(), prompts(4, 2)
    result = calibrated(model, samples, **RECIPES["balanced"], activations=activations, sqnr_calls=100)
    loaded = load_ascend(export(result, model, tmp_path / "out"))
    assert set(loaded) == set(result.layers)
    for name, layer in result.layers.items():
        for key in ("weight", "weight_scale", "bias", "mul_scale"):
            one, other = getattr(layer, key), getattr(loaded[name], key)
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)
    with comparing(model, {name: (lambda layer=layer: layer) for name, layer in loaded.items()}) as powers:
        exact = outputs(model, samples)
    rows = {row["name"]: row for row in result.report["layers"]}
    assert {name: round(power.sqnr, 2) for name, power in powers.items()} == {
        name: rows[name]["sqnr"] for name in loaded
    }
    power = Power()
    with quantized(model, loaded):
        for one, other in zip(exact, outputs(model, samples), strict=True):
            power.add(one[0], other[0])
    assert result.report["totals"]["output_sqnr"] == pytest.approx(power.sqnr)


@pytest.mark.parametrize(
    ("dtype", "settings", "most"),
    [
        (torch.float16, {}, "W8A8"),
        (torch.bfloat16, {}, "W8A8"),
        (torch.float32, {"symmetric": True}, "W8A8"),
        (torch.bfloat16, {"activations": "float"}, "W8A16"),
    ],
    ids=str,
)
def test_half_precision_symmetric_ranges_and_weights_alone(dtype, settings, most):
    model, samples = hard(dtype=dtype), prompts(4, 1, dtype=dtype)
    plain, balanced = (calibrated(model, samples, **recipe, **settings) for recipe in ({}, RECIPES["balanced"]))
    assert {layer.scheme for layer in balanced.layers.values()} == {most}
    if "symmetric" in settings:
        assert not any(layer.input_zero_point.any() for layer in balanced.layers.values())
    gain = sqnr(model, balanced.layers, samples) - sqnr(model, plain.layers, samples)
    assert gain > (8 if most == "W8A8" else -1.0)  # weights alone have no outliers


def test_the_layers_with_the_largest_error_fall_back_and_are_float_in_the_file(tmp_path):
    model, samples, count = hard(), prompts(4, 1), 3
    settings = {"smoothing": True, "sqnr_calls": 100}
    whole = calibrated(model, samples, **settings)
    order = sorted((row for row in whole.report["layers"] if row["scheme"]), key=lambda row: -row["mse"])
    worst = {row["name"] for row in order[:count]}
    result = calibrated(model, samples, **settings, fallback=count)
    assert set(whole.layers) - set(result.layers) == worst
    assert same(
        bits(result.layers), {n: v for n, v in bits(whole.layers).items() if n.rsplit(".", 1)[0] in result.layers}
    )
    export(result, model, tmp_path / "out")
    description = json.loads((tmp_path / "out" / "quant_model_description_w8a8.json").read_text())
    tensors = load_file(tmp_path / "out" / "quant_model_weight_w8a8.safetensors")
    for name in worst:
        assert description[f"{name}.weight"] == "FLOAT"
        assert torch.equal(tensors[f"{name}.weight"], layer_at(model, name).weight)
    assert {row["name"] for row in result.report["layers"] if "largest output error" in (row["reason"] or "")} == worst
