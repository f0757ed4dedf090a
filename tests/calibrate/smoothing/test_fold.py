"""Folding smoothing factors into the producers of inputs keeps the int8 codes of the smoothed layers and the output."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from octavo.calibrate.calibration import calibrate
from octavo.calibrate.layers.install import quantized
from octavo.calibrate.layers.modules import QuantizedLayer
from octavo.calibrate.layers.noise_level import NoiseLevel
from octavo.calibrate.replay.sqnr import Power, outputs
from octavo.calibrate.settings import Settings
from octavo.calibrate.smoothing.fold import FoldResult, fold, multiply_output
from octavo.pipelines.family import Fold, Group

from ...pipelines.test_fold_groups import CASES, Case
from ...zoo.layer_kinds import frozen
from ...zoo.toy import Call

KINDS = ("W8A8", "W8A8_TIMESTEP", "W8A8_DYNAMIC", "W8A16")
ACTIVATIONS = ("static", "timestep", "dynamic")


def smoothed(case: str, **settings: Any) -> tuple[Case, list[Call], dict[str, QuantizedLayer]]:
    """Returns a case with large channels, its calls, and its integer layers, which have smoothing factors."""
    model, groups, args, arguments = CASES[case]()
    model.requires_grad_(False)
    samples = [
        Call((args[0] * factor, *args[1:]), arguments)
        if args
        else Call((), arguments | {"timestep": torch.tensor([factor] * 2)})
        for factor in (1.0, 0.9, 0.8, 1.1)
    ]
    result = calibrate(model, lambda: samples, Settings(smoothing=True, groups=groups, sqnr_calls=0, **settings))
    return (model, groups, args, arguments), samples, result.layers


def integer_output(
    model: nn.Module, layers: dict[str, QuantizedLayer], folded: FoldResult | None, samples: list[Call]
) -> Tensor:
    """Returns the outputs of the integer model on all samples, as one flat tensor."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if folded is not None:
        layers = folded.layers
        model.load_state_dict(folded.values(), strict=False)
    with quantized(model, layers):
        output = torch.cat([tensor.flatten() for call in outputs(model, samples) for tensor in call])
    model.load_state_dict(before)
    return output


def difference(one: Tensor, other: Tensor) -> float:
    power = Power()
    power.add(one, other)
    return power.sqnr or float("inf")


def multipliers(layers: dict[str, QuantizedLayer]) -> set[str]:
    return {name for name, layer in layers.items() if layer.mul_scale is not None}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_fewer_multiplies_the_same_codes_and_the_same_output_within_its_rounding(case, activations):
    """Rounding deq to 11 bits and quant_bias to integers moves a value by a part of a step of the next layer's codes.

    So the outputs differ by less than quantization itself costs, and the folded model is as near to the float model.
    """
    (model, groups, *_), samples, layers = smoothed(case, activations=activations)
    result = fold(model, layers, groups(model))
    gone = multipliers(layers) - multipliers(result.layers)
    assert len(gone) > 4
    assert set(layers) == set(result.layers)
    assert all(torch.equal(layers[name].weight, result.layers[name].weight) for name in layers)
    exact = torch.cat([tensor.flatten() for call in outputs(model, samples) for tensor in call])
    before, after = integer_output(model, layers, None, samples), integer_output(model, layers, result, samples)
    assert difference(before, after) > difference(exact, before)
    assert difference(exact, after) > difference(exact, before) - 1.0


@pytest.mark.parametrize("case", CASES)
def test_powers_of_two_change_no_bit_but_those_of_a_modulation(case):
    """Factors that are powers of two only move exponents; only (1 + scale) / s - 1 of a modulation is rounded again."""
    (model, groups, *_), samples, layers = smoothed(case)
    for layer in layers.values():
        if layer.mul_scale is not None:
            layer.mul_scale.copy_(torch.exp2(layer.mul_scale.log2().round()))
    plain = [group for group in groups(model) if not any(target.plus_one for target in group.folds)]
    result = fold(model, layers, plain)
    assert multipliers(result.layers) < multipliers(layers)
    assert torch.equal(integer_output(model, layers, None, samples), integer_output(model, layers, result, samples))


def test_folding_leaves_its_arguments_unchanged():
    (model, groups, *_), samples, layers = smoothed("stdit3")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    numbers = {name: {key: value.clone() for key, value in layers[name].state_dict().items()} for name in layers}
    before = integer_output(model, layers, None, samples)
    result = fold(model, layers, groups(model))
    assert result.parameters.keys() <= state.keys()
    assert result.parameters
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(
        torch.equal(value, numbers[name][key]) for name in layers for key, value in layers[name].state_dict().items()
    )
    assert torch.equal(integer_output(model, layers, None, samples), before)


class Chain(nn.Module):
    """Two layers whose input a third layer or a norm produces."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(8, 8, bias=bias), nn.LayerNorm(8)
        self.left, self.right = nn.Linear(8, 3), nn.Linear(8, 2)


MULTIPLIER = torch.exp2(torch.linspace(-3, 3, 8))


def behind(first: str = "first", plus_one: bool = False) -> list[Group]:
    return [Group(("left", "right"), (Fold(first, 0, plus_one),))]


def chain(model: nn.Module, kind: str = "W8A8", right: Tensor | None = MULTIPLIER) -> dict[str, QuantizedLayer]:
    return {
        "first": frozen(model.first, kind),
        "left": frozen(model.left, kind, multiplier=MULTIPLIER),
        "right": frozen(model.right, kind, multiplier=right),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("corrected", [False, True])
def test_multiply_output_scales_and_shifts_an_integer_layer(kind, corrected):
    model = Chain()
    layer = frozen(model.first, kind, correction=torch.linspace(-1, 1, 8) if corrected else None)
    by, plus = MULTIPLIER.double(), torch.linspace(-2, 2, 8).double()
    other = type(layer)(multiply_output(layer, by, plus))
    assert torch.equal(other.weight, layer.weight)
    assert other.made_bias == layer.made_bias
    if kind == "W8A8_TIMESTEP":
        layer.noise_level = other.noise_level = NoiseLevel.of(torch.tensor(600.0))
    x = torch.randn(20, 8)
    wanted = layer(x).double() * by + plus
    # both layers round deq to 11 bits, and the bias to half a step of quant_bias
    step = other.deq.view(-1, 8).amax(0) if layer.calibrated else 1e-6
    sums = (wanted.abs() + plus.abs() + 2 * by) * 2.0**-10
    assert bool(((other(x) - wanted).abs() <= sums + 1.02 * step).all())


@pytest.mark.parametrize("kind", KINDS)
def test_all_layers_of_a_group_have_to_agree(kind):
    model = Chain()
    layers = chain(model, kind)
    assert multipliers(fold(model, layers, behind()).layers) == set()
    for other in (None, MULTIPLIER * 2):
        result = fold(model, layers | {"right": frozen(model.right, kind, multiplier=other)}, behind())
        assert result.layers["left"] is layers["left"]
        assert result.layers["first"] is layers["first"]
        assert not result.parameters
    only = fold(model, {name: layers[name] for name in ("first", "left")}, behind())
    assert multipliers(only.layers) == {"left"}  # `right` is float and gets the same input


def test_a_producer_that_cannot_be_multiplied_leaves_its_group_unchanged():
    model = Chain(bias=False)
    layers = chain(model)
    for subset in (layers, {name: layers[name] for name in ("left", "right")}):  # `first`: integer, float
        result = fold(model, subset, behind(plus_one=True))
        assert result.layers == subset
        assert not result.parameters
    model.norm = nn.LayerNorm(8, elementwise_affine=False)
    assert fold(model, layers, behind("norm")).layers == layers


@pytest.mark.parametrize("target", ["first", "norm"])
def test_multiplied_float_parameters_are_returned(target):
    model = Chain()
    layers = {name: layer for name, layer in chain(model).items() if name != "first"}
    result = fold(model, layers, behind(target))
    x = torch.randn(5, 8)
    before = model.get_submodule(target)(x) * MULTIPLIER
    model.load_state_dict(result.values(), strict=False)
    torch.testing.assert_close(model.get_submodule(target)(x), before)


@pytest.mark.parametrize("fallback", [0, 3])
@pytest.mark.parametrize("case", CASES)
def test_without_multipliers_every_layer_has_folded_factors_or_none(case, fallback):
    """A layer of a smoothing group from which `fallback` takes another layer stays float too."""
    settings = {"activations": "dynamic", "fold": True, "multipliers": False, "fallback": fallback}
    (model, groups, *_), samples, layers = smoothed(case, **settings)
    assert layers
    assert not multipliers(layers)
    result = calibrate(model, lambda: samples, Settings(smoothing=True, groups=groups, sqnr_calls=0, **settings))
    assert fallback or result.parameters
