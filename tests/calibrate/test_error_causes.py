"""The error of a layer is split into rounding and clipping of input and weight, and the shares add up to it."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from octavo.calibrate.calibration import calibrate
from octavo.calibrate.choice import Choice, layer_of
from octavo.calibrate.error_causes import CAUSES, causes_of, layer_kind
from octavo.calibrate.layers.inputs import DynamicInput, FloatInput, StaticInput, TimestepInput
from octavo.calibrate.layers.noise_level import NoiseLevel
from octavo.calibrate.layers.scheme import ACTIVATION, FP8, MXFP8, SYMMETRIC_ACTIVATION, QParams, Range, qparams_of
from octavo.calibrate.layers.transforms import Multiply
from octavo.calibrate.layers.weights import QuantizedWeight
from octavo.calibrate.settings import Settings

from ..zoo.toy import calls, source_of, toy

FP8_RULE = replace(SYMMETRIC_ACTIVATION, element=FP8)


def static(width=4.0, rule=ACTIVATION):
    return StaticInput(qparams_of(Range(-width, width), rule, torch.float32), scheme=rule)


def by_level():
    qparams = QParams(torch.tensor([0.03, 0.04]), torch.tensor([0, 3], dtype=torch.int32))
    return TimestepInput(qparams, torch.tensor([500.0]))


INPUTS = {
    "static": static(), "timestep": by_level(), "dynamic": DynamicInput(), "weight-only": FloatInput(),
    "fp8": static(rule=FP8_RULE), "fp8 dynamic": DynamicInput(scheme=FP8_RULE),
    "mxfp8": DynamicInput(scheme=replace(SYMMETRIC_ACTIVATION, element=MXFP8)),
}  # fmt: skip
torch.manual_seed(0)
LAYERS = {"linear": nn.Linear(32, 8), "convolution": nn.Conv2d(4, 8, 3, padding=1)}


def made(module, input, **more):
    """Returns the quantized layer of `module`, an input for it, the float output and the quantized output."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 16, 32) if isinstance(module, nn.Linear) else (2, 4, 6, 6)
    x = torch.randn(shape, generator=generator).clamp(-3.7, 3.7)
    layer = layer_of(module, Choice(input, **more))
    layer.noise_level = NoiseLevel.of(torch.tensor([100.0, 900.0]))
    with torch.no_grad():
        return layer, x, module(x), layer(x)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("input", INPUTS)
def test_the_shares_add_up_and_little_is_left_over(kind, input):
    if kind == "convolution" and input == "mxfp8":
        pytest.skip("MXFP8 has no convolutions")
    layer, x, exact, other = made(LAYERS[kind], INPUTS[input])
    sums = causes_of(LAYERS[kind], layer, x, exact, other)
    shares = dict(zip(CAUSES, sums.shares, strict=True))
    assert sums.error == pytest.approx(float((other - exact).double().square().sum()), rel=1e-4)
    assert sum(sums.shares) == pytest.approx(sums.error, rel=1e-9)
    assert abs(shares["rest"]) < 0.01 * sums.error
    assert shares["input clipping"] == shares["weight clipping"] == 0.0
    assert shares["weight rounding"] > 0.1 * sums.error
    assert (shares["input rounding"] == 0.0) == (input == "weight-only")


def test_a_share_is_what_the_exchange_of_the_factor_for_its_float_one_brings():
    module, scale = LAYERS["linear"], torch.linspace(0.5, 2.0, 32)
    layer, x, exact, other = made(module, static(), transform=Multiply(scale))
    sums = causes_of(module, layer, x, exact, other)
    x0, w0 = x * scale, (module.weight / scale).detach()
    x2, w2 = layer.input.represented(x0), layer.weight.detach() * layer.weight_scale.view(-1, 1)
    effect = (F.linear(x2 - x0, w0) + F.linear(x2 - x0, w2)) / 2
    assert sums.shares[0] + sums.shares[1] == pytest.approx(float((effect * (other - exact)).sum()), rel=1e-3)


def test_narrow_ranges_and_narrow_weight_scales_are_clipping():
    module = LAYERS["linear"]
    sums = causes_of(module, *made(module, static(width=1.0)))
    assert sums.shares[1] > 0.9 * sums.error
    scale = module.weight.detach().abs().amax(1) / 254
    codes = (module.weight.detach() / scale.view(-1, 1)).round().clamp(-127, 127).to(torch.int8)
    sums = causes_of(module, *made(module, FloatInput(), weight=QuantizedWeight(codes, scale)))
    assert sums.shares[3] > 0.9 * sums.error


def test_the_report_splits_the_errors_that_it_reports():
    report = calibrate(toy(), source_of(calls()), Settings(defaults={}, explain=True)).report
    section, rows = report["causes"], {row["name"]: row for row in report["layers"] if "weight_scale" in row}
    assert {row["name"] for row in section["layers"]} == set(rows)
    assert section["calls"] == 3
    assert not section["held_out"]
    for row in section["layers"]:
        assert -10 * math.log10(row["error"]) == pytest.approx(rows[row["name"]]["sqnr"], abs=0.01)
        assert sum(row["shares"]) == pytest.approx(row["error"])
    assert sum(row["layers"] for row in section["kinds"]) == len(rows)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("transformer_blocks.0.attn.to_q", "attention, input"),
        ("transformer_blocks.0.attn.add_k_proj", "attention, input"),
        ("spatial_blocks.1.attn.qkv", "attention, input"),
        ("spatial_blocks.1.attn.proj", "attention, output"),
        ("blocks.0.attn1.to_out.0", "attention, output"),
        ("blocks.0.ffn.net.0.proj", "feed-forward"),
        ("transformer_blocks.0.ff_context.net.2", "feed-forward"),
        ("transformer_blocks.0.norm1_context.linear", "modulation"),
        ("time_text_embed.timestep_embedder.linear_1", "embedding"),
        ("proj_out", "other"),
    ],
)
def test_kinds_of_layers(name, kind):
    assert layer_kind(name, "Linear") == kind
    assert layer_kind(name, "Conv2d") == "convolution"
