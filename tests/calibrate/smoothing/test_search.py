"""Smoothing gains where channels are large, leaves other layers alone, and shares factors in the right groups."""

import pytest
import torch
from torch import Tensor, nn

from octavo.calibrate.calibration import calibrate
from octavo.calibrate.layers.inputs import StaticInput
from octavo.calibrate.layers.modules import QuantizedLinear
from octavo.calibrate.layers.scheme import ACTIVATION
from octavo.calibrate.layers.transforms import Multiply
from octavo.calibrate.replay.work import Work
from octavo.calibrate.result import Result
from octavo.calibrate.settings import Settings
from octavo.calibrate.smoothing.growth import GROWTHS
from octavo.calibrate.smoothing.search import largest_of, multiplier_of, smooth, smoothing_groups
from octavo.pipelines.opensora.family import OPENSORA, groups
from octavo.pipelines.sd3 import SD3

from ...pipelines.opensora.test_transformer import call
from ...zoo.hard_sd3 import bits, calibrated, hard, prompts, same, sqnr
from ...zoo.opensora import tiny_transformer
from ...zoo.toy import Call
from ..observers.test_survey import survey_inputs

HELD_OUT = prompts(2, 5, seed=50)


def multipliers(result: Result) -> dict[str, Tensor]:
    return {name: layer.mul_scale for name, layer in result.layers.items() if layer.mul_scale is not None}


def gain(seed: int, outliers: int) -> float:
    """Returns how many dB smoothing adds to the output SQNR of calls outside the calibration."""
    model, samples = hard(seed, outliers), prompts(16, 2, seed)
    plain, smoothed = (
        sqnr(model, calibrated(model, samples, smoothing=on, sqnr_calls=0).layers, HELD_OUT) for on in (False, True)
    )
    return smoothed - plain


def test_smoothing_gains_where_channels_are_large():
    assert gain(seed=0, outliers=2) > 10


def test_smoothing_loses_nothing_where_no_channels_are_large():
    """The mean over models counts, as held-out calls of a few prompts do not show how large all other values are."""
    gains = [gain(seed, outliers=0) for seed in range(3)]
    assert sum(gains) / len(gains) > -0.3


def test_layers_with_one_input_share_the_multiplier_and_rows_of_a_modulation_have_none():
    model = hard()
    factors = multipliers(calibrated(model, prompts(), smoothing=True))
    assert factors
    assert not [name for name in factors if name.endswith(".linear")]
    for name, multiplier in factors.items():
        if name.endswith("to_q"):
            others = [factors[name.replace("to_q", leaf)] for leaf in ("to_k", "to_v")]
            assert all(torch.equal(multiplier, other) for other in others)
    assert any(name.endswith("to_q") for name in factors)


def test_a_multiplier_that_is_found_is_applied_and_the_weight_carries_its_inverse():
    model = hard()
    result = calibrated(model, prompts(), smoothing=True)
    rows = {row["name"]: row for row in result.report["layers"]}
    for name, multiplier in multipliers(result).items():
        layer, weight = result.layers[name], model.get_submodule(name).weight
        assert isinstance(layer, QuantizedLinear)
        stood_for = layer.weight.float() * layer.weight_scale[:, None] * multiplier
        assert float((stood_for - weight).abs().max()) < 0.6 * float(layer.weight_scale.max() * multiplier.max())
        assert rows[name]["multiplier"] == [float(multiplier.min()), float(multiplier.max())]


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_repeating_gives_the_same_bits_and_leaves_the_model_unchanged(kind):
    model, samples = hard(), prompts(4, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    one = calibrated(model, samples, smoothing=True, activations=kind)
    assert same(bits(one.layers), bits(calibrated(model, samples, smoothing=True, activations=kind).layers))
    assert same(before, model.state_dict())


class Modulated(nn.Module):
    """A layer whose input has one row for each sample, and a layer whose input has tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.row, self.tokens = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:  # (samples, tokens, 8)
        return self.tokens(x) + self.row(x.mean(1))[:, None]


def large(count: int = 8) -> list[Call]:
    generator = torch.Generator().manual_seed(1)
    scale = torch.tensor([100.0] + [1.0] * 7)
    return [Call((torch.randn(2, 20, 8, generator=generator) * scale,), {}) for _ in range(count)]


@pytest.mark.filterwarnings("error")  # such as torch's warnings about weights that require gradients
def test_layers_that_see_one_row_for_each_sample_are_left_alone_whatever_they_see():
    surveys, _ = survey_inputs(Modulated(), large())
    chosen = smooth(Modulated(), surveys, [], StaticInput, ACTIVATION, Work())
    assert set(chosen) == {"tokens"}
    assert chosen["tokens"].gain > 6


def test_channels_that_are_not_large_in_held_out_calls_are_not_smoothed():
    """Factors are judged on held-out calls, and here other channels are large in the held-out calls."""
    samples = large(16)
    for position, sample in enumerate(samples):
        if position % 4 == 3:
            samples[position] = Call((sample.args[0].roll(4, -1),), {})
    model = Modulated()
    alone = smooth(model, survey_inputs(model, large(16))[0], [], StaticInput, ACTIVATION, Work())
    mixed = smooth(model, survey_inputs(model, samples)[0], [], StaticInput, ACTIVATION, Work())
    assert alone["tokens"].gain > 6
    assert "tokens" not in mixed or mixed["tokens"].gain < alone["tokens"].gain / 2


def test_only_ranges_of_smoothed_inputs_hold_more_than_the_calls():
    model, samples = hard(), prompts(4, 3)
    result = calibrated(model, samples, smoothing=True)
    surveys, _ = survey_inputs(model, samples)
    growths = {}
    for row in result.report["layers"]:
        if row["scheme"]:
            multiplier = result.layers[row["name"]].mul_scale
            low, high = surveys[row["name"]].all.range(None if multiplier is None else Multiply(multiplier))
            growths[row["name"]] = row["range"][1] / high
            assert row["range"][0] / low == pytest.approx(growths[row["name"]], rel=1e-4)
    smoothed = set(multipliers(result))
    assert all(growths[name] == pytest.approx(1, rel=1e-6) for name in growths if name not in smoothed)
    assert {min(GROWTHS, key=lambda each: abs(each - growths[name])) for name in smoothed} > {1.0}


def opensora(per_block: bool) -> tuple[nn.Module, list[Call]]:
    """Returns calls and a tiny STDiT3 whose blocks have large channels, other ones in each block, if `per_block`."""
    model, generator = tiny_transformer().requires_grad_(False), torch.Generator().manual_seed(3)
    for block in (*model.spatial_blocks, *model.temporal_blocks):
        for layer, row in ((block.attn.qkv, 1), (block.mlp.fc1, 4)):
            places = torch.randperm(layer.in_features, generator=generator)[: 3 * per_block]
            block.scale_shift_table[row, places] += 50
            layer.weight[:, places] /= 50
    samples = []
    for step in range(8):
        args, kwargs = call(model)
        noise = torch.randn(args[0].shape, generator=generator)
        samples.append(Call((noise, args[1] * (1 - step / 8), *args[2:]), kwargs))
    return model, samples


def test_the_same_factors_for_all_blocks_unless_those_of_their_own_are_much_better():
    model, samples = opensora(per_block=True)
    settings = {"defaults": OPENSORA.keep_float, "smoothing": True}
    plain, alone, grouped = (
        sqnr(model, calibrated(model, samples, **settings | more).layers, samples[3:4])
        for more in ({"smoothing": False}, {"groups": None}, {"groups": groups})
    )
    assert alone > plain + 10
    assert grouped > alone - 1.0


def test_a_group_gets_one_factor_and_others_follow_their_input():
    model, samples = opensora(per_block=False)
    surveys, _ = survey_inputs(model, samples)
    partition = list(smoothing_groups(surveys, groups(model)))
    names = [name for group in partition for name in group]
    assert len(set(names)) == len(names)
    assert [f"{kind}_blocks.{index}.attn.qkv" for kind in ("spatial", "temporal") for index in (0, 1)] in partition
    query = survey_inputs(hard(), prompts(4, 1))[0]
    assert [f"transformer_blocks.0.attn.{leaf}" for leaf in ("to_q", "to_k", "to_v")] in list(
        smoothing_groups(query, [])
    )


def test_factors_are_positive_and_one_for_channels_that_say_nothing():
    x = torch.randn(50, 6) * torch.tensor([1.0, 100.0, 0.0, 1e-30, 1e30, 1.0])
    weight = torch.randn(4, 6)
    weight[:, 5] = 0
    survey = survey_inputs(nn.Sequential(nn.Linear(6, 4)), [Call((x,), {})])[0]["0"]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        factors = multiplier_of(largest_of([weight.to(dtype)]), survey.all, 0.5)
        assert factors.dtype == dtype
        assert bool((factors > 0).all() and factors.isfinite().all())
        assert factors[2] == factors[5] == 1
        assert factors[1] < factors[0]
    assert torch.equal(multiplier_of(torch.zeros(6), survey.all, 0.5), torch.ones(6))


def test_the_groups_of_the_family_are_those_of_the_model_it_loads():
    assert OPENSORA.groups is groups
    assert SD3.groups is not None


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_a_rotation_gains_where_one_channel_is_large_and_its_weights_are_too(activations):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48, bias=False)).requires_grad_(False)
    calls = [Call((torch.randn(2, 40, 64) * torch.where(torch.arange(64) == 5, 40.0, 1.0),), {}) for _ in range(8)]
    errors = {}
    for rotation in ("off", "auto", "16"):
        settings = Settings(activations=activations, rotation=rotation, sqnr_calls=8, defaults={})
        result = calibrate(model, lambda: calls, settings)
        errors[rotation] = result.report["totals"]["output_sqnr"]
        assert (result.layers["0"].rotation is not None) == (rotation != "off")
    assert errors["auto"] >= errors["16"] > errors["off"] + 3


def test_only_sizes_that_divide_the_channels_are_tried():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 8, bias=False), nn.Linear(8, 8)).requires_grad_(False)
    calls = [Call((torch.randn(2, 40, 24) * torch.where(torch.arange(24) == 5, 40.0, 1.0),), {}) for _ in range(4)]
    result = calibrate(model, lambda: calls, Settings(rotation="auto", activations="dynamic", defaults={}))
    assert all(layer.rotation is None for layer in result.layers.values())
