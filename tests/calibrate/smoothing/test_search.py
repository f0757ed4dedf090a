"""Smoothing: what it gains, whom it leaves alone, and who shares its factors."""

import pytest
import torch
from torch import Tensor, nn

from octavo.calibrate.layers.inputs import StaticInput
from octavo.calibrate.layers.modules import QuantizedLinear
from octavo.calibrate.layers.scheme import ACTIVATION
from octavo.calibrate.replay.work import Work
from octavo.calibrate.result import Result
from octavo.calibrate.smoothing.search import largest_of, multiplier_of, smooth, smoothing_groups
from octavo.pipelines.opensora.family import OPENSORA, groups
from octavo.pipelines.sd3 import SD3

from ...pipelines.opensora.test_transformer import call
from ...zoo.hard_sd3 import bits, calibrated, hard, prompts, same, sqnr
from ...zoo.opensora import tiny_transformer
from ...zoo.toy import Call
from ..observers.test_survey import survey_inputs

HELD = prompts(2, 5, seed=50)


def multipliers(result: Result) -> dict[str, Tensor]:
    return {name: layer.mul_scale for name, layer in result.layers.items() if layer.mul_scale is not None}


def gain(seed: int, outliers: int) -> float:
    """dB that smoothing adds to the output of calls that were not calibrated on."""
    model, samples = hard(seed, outliers), prompts(16, 2, seed)
    plain, smoothed = (
        sqnr(model, calibrated(model, samples, smoothing=on, sqnr_calls=0).layers, HELD) for on in (False, True)
    )
    return smoothed - plain


def test_it_gains_where_channels_are_large():
    assert gain(seed=0, outliers=2) > 10


def test_it_loses_nothing_where_none_are():
    """On average: of few prompts, calls held out do not tell how large the values of all others are."""
    gains = [gain(seed, outliers=0) for seed in range(3)]
    assert sum(gains) / len(gains) > -0.3


def test_layers_with_one_input_share_the_multiplier_and_rows_of_a_modulation_have_none():
    model = hard()
    found = multipliers(calibrated(model, prompts(), smoothing=True))
    assert found
    assert not [name for name in found if name.endswith(".linear")]
    for name, multiplier in found.items():
        if name.endswith("to_q"):
            others = [found[name.replace("to_q", leaf)] for leaf in ("to_k", "to_v")]
            assert all(torch.equal(multiplier, other) for other in others)
    assert any(name.endswith("to_q") for name in found)


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
def test_again_the_same_bits_and_no_model_is_changed(kind):
    model, samples = hard(), prompts(4, 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    one = calibrated(model, samples, smoothing=True, activations=kind)
    assert same(bits(one.layers), bits(calibrated(model, samples, smoothing=True, activations=kind).layers))
    assert same(before, model.state_dict())


class Modulated(nn.Module):
    """A layer that sees one row for each sample, with a channel that is large, and one that sees tokens."""

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


@pytest.mark.filterwarnings("error")  # as of a graph of gradients that nobody wants, of weights that have them
def test_layers_that_see_one_row_for_each_sample_are_left_alone_whatever_they_see():
    surveys, _ = survey_inputs(Modulated(), large())
    chosen = smooth(Modulated(), surveys, [], StaticInput, ACTIVATION, Work())
    assert set(chosen) == {"tokens"}
    assert chosen["tokens"].gain > 6


def test_what_is_large_in_calls_of_the_one_kind_alone_is_not_smoothed_for_it():
    """Factors come from calls that are not held out and are judged on those that are: these have other large ones."""
    samples = large(16)
    for at, each in enumerate(samples):
        if at % 4 == 3:
            samples[at] = Call((each.args[0].roll(4, -1),), {})
    model = Modulated()
    alone = smooth(model, survey_inputs(model, large(16))[0], [], StaticInput, ACTIVATION, Work())
    mixed = smooth(model, survey_inputs(model, samples)[0], [], StaticInput, ACTIVATION, Work())
    assert alone["tokens"].gain > 6
    assert "tokens" not in mixed or mixed["tokens"].gain < alone["tokens"].gain / 2


def opensora(per_block: bool) -> tuple[nn.Module, list[Call]]:
    """A tiny STDiT3 whose blocks have large channels: each its own, or none."""
    model, generator = tiny_transformer().requires_grad_(False), torch.Generator().manual_seed(3)
    for block in (*model.spatial_blocks, *model.temporal_blocks):
        for layer, row in ((block.attn.qkv, 1), (block.mlp.fc1, 4)):
            places = torch.randperm(layer.in_features, generator=generator)[: 3 * per_block]
            block.scale_shift_table[row, places] += 50
            layer.weight[:, places] /= 50
    samples = []
    for at in range(8):
        args, kwargs = call(model)
        noise = torch.randn(args[0].shape, generator=generator)
        samples.append(Call((noise, args[1] * (1 - at / 8), *args[2:]), kwargs))
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
    found = list(smoothing_groups(surveys, groups(model)))
    names = [name for each in found for name in each]
    assert len(set(names)) == len(names)
    assert [f"{kind}_blocks.{at}.attn.qkv" for kind in ("spatial", "temporal") for at in (0, 1)] in found
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
        made = multiplier_of(largest_of([weight.to(dtype)]), survey.all, 0.5)
        assert made.dtype == dtype
        assert bool((made > 0).all() and made.isfinite().all())
        assert made[2] == made[5] == 1
        assert made[1] < made[0]
    assert torch.equal(multiplier_of(torch.zeros(6), survey.all, 0.5), torch.ones(6))


def test_the_groups_of_the_family_are_those_of_the_model_it_loads():
    assert OPENSORA.groups is groups
    assert SD3.groups is not None
