"""A convolution is calibrated on its patches as a linear is on its rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from octavo.calibrate.calibration import calibrate_folded
from octavo.calibrate.choice import Choice, layer_of
from octavo.calibrate.layers.inputs import StaticInput
from octavo.calibrate.layers.install import quantized
from octavo.calibrate.layers.scheme import ACTIVATION, Range, qparams_of
from octavo.calibrate.observers.patches import Patches, PatchSurvey
from octavo.calibrate.replay.current_call import CurrentCall
from octavo.calibrate.replay.sqnr import Power
from octavo.calibrate.rounding.choose_weights import candidates, with_correction
from octavo.calibrate.rounding.judge import error_of, on_patches
from octavo.calibrate.rounding.methods import WEIGHT_METHODS, Method
from octavo.calibrate.rounding.sums import Strided, Sums
from octavo.calibrate.settings import Settings

from ...zoo.convolutions import CHANNELS, geometries, pictures, small
from ...zoo.toy import Call

INPUT = StaticInput(qparams_of(Range(-3.0, 3.0), ACTIVATION, torch.float32))


def conv_of(options, seed=0):
    torch.manual_seed(seed)
    return nn.Conv2d(CHANNELS, CHANNELS, **options).requires_grad_(False)


@settings(max_examples=80, deadline=None)
@given(geometries(), st.integers(0, 2**31))
def test_a_convolution_is_a_linear_on_all_of_its_patches(options, seed):
    conv = conv_of(options, seed)
    x = torch.randn(2, CHANNELS, 9, 10)
    rows = Patches.of(conv, 10**6)(x)
    size = conv.weight[0].shape
    shaped = rows.view(-1, CHANNELS, *size[1:])
    y = nn.functional.conv2d(shaped, conv.weight, conv.bias, groups=conv.groups).flatten(1)
    wanted = conv(x)
    assert torch.allclose(y, wanted.permute(0, 2, 3, 1).reshape(-1, CHANNELS), atol=1e-5)
    layer = layer_of(conv, Choice(INPUT))
    whole = layer(x).permute(0, 2, 3, 1).reshape(-1, CHANNELS)
    assert torch.equal(on_patches(layer)(shaped).flatten(1), whole)


def test_some_patches_are_of_all_and_the_same_twice():
    conv = conv_of({"kernel_size": 3, "padding": 1})
    x = torch.randn(2, CHANNELS, 9, 10)
    every = {tuple(row) for row in Patches.of(conv, 10**6)(x).tolist()}
    some = Patches.of(conv, 40)(x)
    assert some.shape == (40, 9 * CHANNELS)
    assert len({tuple(row) for row in some.tolist()}) == 40
    assert {tuple(row) for row in some.tolist()} <= every
    assert torch.equal(some, Patches.of(conv, 40)(x))
    assert torch.equal(Patches.of(conv, 40)(x[0]), Patches.of(conv, 40)(x[:1]))


def survey_of(conv, inputs):
    """Returns a survey of the inputs, of which every fourth is held out, and the sums over the other inputs."""
    current = CurrentCall(conv)
    survey = PatchSurvey(current, "conv", conv)
    sums = Sums(Choice(INPUT), current, conv.in_channels * 9, Patches.of(conv, 10**6), True, groups=conv.groups)
    for call, x in zip(current.tracked([Call((x,), {}) for x in inputs]), inputs, strict=True):
        del call
        survey.add(survey.read(x))
        if not current.held_out:
            sums.add(sums.read(x))
    return survey, sums


@pytest.mark.parametrize("groups", [1, 4, CHANNELS])
def test_a_corrected_bias_leaves_no_mean_error(groups):
    conv = conv_of({"kernel_size": 3, "padding": 1, "groups": groups})
    inputs = [torch.rand(3, CHANNELS, 8, 8) * 2 for _ in range(3)]
    _, sums = survey_of(conv, inputs)
    choice = with_correction(conv.weight, Choice(INPUT), sums, groups)

    def mean_error(choice):
        return float((layer_of(conv, choice)(x) - conv(x)).mean((0, 2, 3)).abs().max())

    x = torch.cat(inputs)
    assert mean_error(choice) < 0.1 * mean_error(Choice(INPUT))  # the rest is the rounding of deq to 19 bits


def smooth(count):
    """Returns smooth inputs (count, CHANNELS, 8, 8), whose correlations the rounding methods can use."""
    rough = torch.randn(count, CHANNELS, 3, 3, generator=torch.Generator().manual_seed(2))
    return nn.functional.interpolate(rough, size=(8, 8), mode="bilinear")


@pytest.mark.parametrize("name", [name for name in WEIGHT_METHODS if name != "round-to-nearest"])
def test_no_method_is_worse_than_rounding_on_patches_held_out(name):
    conv = conv_of({"kernel_size": 3, "padding": 1})
    survey, sums = survey_of(conv, [smooth(48)[start : start + 2] for start in range(0, 48, 2)])
    choices = candidates(conv, Choice(INPUT), sums, Method((name,), {}, True))
    assert len(choices) == 4
    errors = {(c.method, c.correction is not None): error_of(conv, c, survey.judge_sample) for c in choices}
    assert min(errors.values()) < errors["round-to-nearest", False]


@pytest.mark.parametrize("groups", [2, 4, CHANNELS])
def test_convolutions_in_groups_are_rounded_by_gptq(groups):
    conv = conv_of({"kernel_size": 3, "padding": 1, "groups": groups})
    survey, sums = survey_of(conv, [smooth(48)[start : start + 2] for start in range(0, 48, 2)])
    choices = candidates(conv, Choice(INPUT), sums, Method(("gptq", "admm"), {}, True))
    assert [(c.method, c.correction is not None) for c in choices] == [
        ("round-to-nearest", False), ("round-to-nearest", True), ("gptq", False), ("gptq", True),
    ]  # fmt: skip
    errors = [error_of(conv, choice, survey.judge_sample) for choice in choices]
    assert errors[2] < errors[0]
    assert errors[3] < errors[1]


def test_rows_of_a_linear_are_taken_evenly_over_calls():
    read = Strided(3)
    x = torch.arange(20.0).view(20, 1)
    assert torch.cat([read(x[:7]), read(x[7:8]), read(x[8:])]).flatten().tolist() == [0, 3, 6, 9, 12, 15, 18]


@pytest.mark.parametrize("activations", ["static", "dynamic", "float"])
def test_a_network_loses_less_with_weights_chosen_by_patches(activations):
    model, given_calls = small(), [Call((x,), {}) for x in pictures(12)]
    held_out = torch.cat(pictures(3, seed=9))

    def noise(**options):
        result, folded = calibrate_folded(model, lambda: given_calls, Settings(activations=activations, **options))
        power = Power()
        with quantized(folded, result.layers):
            power.add(model(held_out), folded(held_out))
        return power.noise, result.report["layers"]

    plain, _ = noise()
    chosen, rows = noise(weights=("gptq",), bias_correction=True)
    assert chosen < 1.05 * plain
    methods = {row["weights"] for row in rows if row["kind"] == "Conv2d"}
    assert methods == {"round-to-nearest", "gptq"}


def test_layers_with_the_largest_error_fall_back_to_float():
    model, given_calls = small(), [Call((x,), {}) for x in pictures(8)]
    result, _ = calibrate_folded(model, lambda: given_calls, Settings(fallback=2))
    float_layers = {row["name"] for row in result.report["layers"] if not row["scheme"]}
    assert len(float_layers) == 2
    worst = sorted(result.report["layers"], key=lambda row: -row["mse"])[:2]
    assert float_layers == {row["name"] for row in worst}
