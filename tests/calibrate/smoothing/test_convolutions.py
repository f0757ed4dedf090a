"""Smoothing of convolutions is exact, never worse on held-out calls, and part of what the formats hold."""

import pytest
import torch
from diffusers import AutoModel, SanaTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from octavo.calibrate.calibration import calibrate, calibrate_folded
from octavo.calibrate.choice import Choice, layer_of
from octavo.calibrate.formats.ascend.read import load_ascend
from octavo.calibrate.formats.diffusers.check import check
from octavo.calibrate.formats.export import export
from octavo.calibrate.layers.inputs import ACTIVATIONS
from octavo.calibrate.layers.install import quantized
from octavo.calibrate.layers.scheme import ACTIVATION, Range
from octavo.calibrate.layers.transforms import Multiply, transformed, transformed_patches, weight_for
from octavo.calibrate.observers.patches import Patches, PatchSurvey
from octavo.calibrate.plan import Plan
from octavo.calibrate.replay.current_call import CurrentCall
from octavo.calibrate.replay.sqnr import outputs, power_of
from octavo.calibrate.replay.work import Work
from octavo.calibrate.result import Result
from octavo.calibrate.settings import Settings
from octavo.calibrate.smoothing.fold import fold
from octavo.calibrate.smoothing.search import columns_of, smooth
from octavo.pipelines.family import Fold, Group

from ...zoo.convolutions import CHANNELS, geometries, small
from ...zoo.convolutions import pictures as plain_pictures
from ...zoo.exported_sd3 import integer_layers
from ...zoo.graphs import both, integers, older, step
from ...zoo.hard_sd3 import bits, same
from ...zoo.layer_kinds import static
from ...zoo.toy import Call

KINDS = ("static", "timestep", "dynamic")
FACTORS = torch.exp2(torch.linspace(-3, 3, CHANNELS))
SIZES = torch.tensor([60.0] + [1.0] * (CHANNELS - 1))  # of the channels of inputs: one is large


@settings(max_examples=40, deadline=None)
@given(geometries(), st.integers(0, 2**31))
def test_a_multiplied_input_and_a_divided_weight_give_the_same_output(options, seed):
    torch.manual_seed(seed)
    conv = nn.Conv2d(CHANNELS, CHANNELS, **options).requires_grad_(False)
    x, multiply = torch.randn(2, CHANNELS, 9, 10), Multiply(FACTORS)
    wanted = conv(x)
    patches, taps = Patches.of(conv, 10**6), conv.weight[0, 0].numel()
    assert torch.equal(transformed_patches(multiply, patches(x), taps), patches(multiply.input(x, -3)))
    columns = columns_of(conv)
    conv.weight.data = weight_for(multiply, conv.weight)
    torch.testing.assert_close(conv(transformed(multiply, x, -3)), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(columns_of(conv), columns / FACTORS)


def images(count: int, seed: int = 0, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, CHANNELS, 8, 8, generator=generator) * SIZES.view(-1, 1, 1) for _ in range(count)]


def convolution(groups: int, seed: int = 0) -> nn.Sequential:
    """Returns a convolution whose weights are small for the large channel of `images`."""
    torch.manual_seed(seed)
    conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=groups).requires_grad_(False)
    large = slice(None) if groups == 1 else slice(CHANNELS // groups)
    conv.weight[large, 0] /= 60
    return nn.Sequential(conv).eval()


def error(model: nn.Module, held_out: list[Tensor], **options: object) -> tuple[float, Result]:
    """Returns the noise of the output with integer layers, divided by the signal."""
    calls = [Call((x,), {}) for x in images(12)]
    result = calibrate(model, lambda: calls, Settings(defaults={}, **options))
    given = [Call((x,), {}) for x in held_out]
    exact = [*outputs(model, given)]
    with quantized(model, result.layers):
        power = power_of(exact, outputs(model, given))
    return power.noise / power.signal, result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [1, 4, CHANNELS])
def test_smoothing_gains_where_a_channel_is_large(kind, groups):
    model, held_out = convolution(groups), images(2, seed=9)
    plain, _ = error(model, held_out, activations=kind)
    smoothed, result = error(model, held_out, activations=kind, smoothing=True)
    assert smoothed < 0.3 * plain
    multiplier = result.layers["0"].mul_scale
    assert multiplier.shape == (CHANNELS,)
    assert multiplier[0] == multiplier.min()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_a_smoothed_convolution_is_never_worse_on_held_out_patches(kind, seed):
    torch.manual_seed(seed)
    model = convolution([1, 2, CHANNELS][seed], seed)
    model[0].weight.data.normal_()
    current = CurrentCall(model)
    survey = PatchSurvey(current, "0", model[0])
    inputs = [x.abs() ** (1 + seed) for x in images(8, seed)]
    for _, x in zip(current.tracked([Call((x,), {}) for x in inputs]), inputs, strict=True):
        survey.add(survey.read(x))
    assert survey.judge_peaks.shape == (len(survey.judge_sample.rows), CHANNELS)
    found = smooth(model, {"0": survey}, [], ACTIVATIONS[kind], ACTIVATION, Work())
    assert all(smoothing.gain > 0.4 for smoothing in found.values())  # 10 % of the error


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_layers_of_a_network_gain_by_smoothing_and_none_loses_more_than_a_new_rounding_can_cost(activations):
    model, calls = small(), [Call((x,), {}) for x in plain_pictures(16)]  # too many for wider ranges

    def layers(smoothing: bool) -> dict[str, dict]:
        settings = Settings(activations=activations, smoothing=smoothing)
        return {row["name"]: row for row in calibrate_folded(model, lambda: calls, settings)[0].report["layers"]}

    plain, smoothed = layers(False), layers(True)
    assert sum("multiplier" in row for row in smoothed.values()) > 1
    gains = [row["sqnr"] - plain[name]["sqnr"] for name, row in smoothed.items()]
    assert min(gains) > -0.6
    assert sum(gains) / len(gains) > 1.0


def layers_of(model: nn.Module, names: list[str]) -> dict[str, nn.Module]:
    """Returns integer layers with multipliers for the convolutions `names` of `model`."""
    layers = {}
    for name in names:
        conv = model.get_submodule(name)
        factors = torch.exp2(torch.randint(-3, 3, (conv.in_channels,)).float())
        layers[name] = layer_of(conv, Choice(static(Range(-3.0, 3.0), conv.weight.dtype), Multiply(factors)))
    return layers


def test_diffusers_and_ascend_read_the_multipliers_of_convolutions_in_groups(tmp_path):
    torch.manual_seed(0)
    model = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=4, num_layers=1,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8, mlp_ratio=2,
        sample_size=4,
    ).requires_grad_(False)  # fmt: skip
    names = [f"transformer_blocks.0.ff.{leaf}" for leaf in ("conv_inverted", "conv_depth", "conv_point")]
    layers = layers_of(model, names)
    assert layers[names[1]].groups > 1
    export(Result(Plan(()), layers, {}), model, tmp_path / "out", ("diffusers", "ascend"))
    assert all(verdict.ok for verdict in check(tmp_path / "out"))
    loaded = integer_layers(AutoModel.from_pretrained(str(tmp_path / "out")))
    assert same(bits(loaded), bits(layers))
    assert same(bits(load_ascend(tmp_path / "out")), bits(layers))


@settings(max_examples=10, deadline=None)
@given(geometries())
def test_graphs_multiply_the_input_of_a_convolution(options):
    model = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, **options)).eval().requires_grad_(False)
    layers = layers_of(model, ["0"])
    codes = torch.randint(-150, 150, (2, CHANNELS, 9, 10), generator=torch.Generator().manual_seed(1))
    x = (codes - layers["0"].input_zero_point) * layers["0"].input_scale / layers["0"].mul_scale.view(-1, 1, 1)
    exact = integers(model, layers, x)
    runtime, device = both(older(model, layers, x), layers, x)
    assert abs(runtime - exact).max() <= 1e-3 * step(exact)
    assert (device == exact).all()


@pytest.mark.parametrize("first", [nn.GroupNorm(2, CHANNELS), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)])
def test_factors_fold_into_what_produces_the_input(first):
    model = nn.Sequential(first, convolution(1)[0]).eval().requires_grad_(False)
    names = [name for name, module in model.named_children() if isinstance(module, nn.Conv2d)]
    layers = layers_of(model, names)
    layers[names[0]] = layers[names[0]] if len(names) == 1 else layer_of(first, Choice(layers[names[0]].input))
    result = fold(model, layers, [Group(("1",), (Fold("0"),))])
    assert result.layers["1"].mul_scale is None
    [x] = images(1)
    with quantized(model, layers):
        before = model(x)
    model.load_state_dict(result.values(), strict=False)
    with quantized(model, result.layers):
        torch.testing.assert_close(model(x), before, atol=0.02 * float(before.std()), rtol=0.0)
