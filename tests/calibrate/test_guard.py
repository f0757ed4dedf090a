"""Layers that FP8 would lose get a scale for each token, or stay float, and the report says so."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from octavo.calibrate.calibration import calibrate
from octavo.calibrate.guard import LOST
from octavo.calibrate.layers.schemes import FP8_DYNAMIC, FP8_STATIC, Instead
from octavo.calibrate.settings import Settings

FLOAT_ONLY = Settings(element="fp8", quantize=("*",))
EITHER = replace(FLOAT_ONLY, instead=(Instead(FP8_DYNAMIC), Instead(FP8_DYNAMIC, 16)))


class Blocks(nn.Module):
    """Three blocks of a linear layer. The second one's input has one token that is `factor` times as large."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, x):
        first = self.blocks[0](x)
        tall = torch.ones(x.shape[1])
        tall[0] = self.factor
        return first + self.blocks[1](x * tall.view(1, -1, 1))[:, 1:].mean() + self.blocks[2](x)


class Call:
    def __init__(self, x, unit):
        self.args, self.kwargs, self.unit, self.step = (x,), {}, unit, 0


def calls(count=8):
    generator = torch.Generator().manual_seed(0)
    return [Call(torch.randn(2, 24, 32, generator=generator), index) for index in range(count)]


@pytest.fixture(scope="module")
def inputs():
    return calls()


def result_of(factor, settings, inputs):
    torch.manual_seed(0)
    return calibrate(Blocks(factor).eval(), lambda: inputs, settings)


def test_no_layer_is_lost_without_outliers(inputs):
    result = result_of(1.0, EITHER, inputs)
    assert result.report["guard"] == []
    assert {layer.scheme for layer in result.layers.values()} == {FP8_STATIC}
    assert all(row["sqnr"] > 25 for row in result.report["layers"])


def test_a_lost_layer_gets_a_scale_for_each_token(inputs):
    result = result_of(1e5, EITHER, inputs)
    (row,) = result.report["guard"]
    assert (row["name"], row["scheme"]) == ("blocks.1", FP8_DYNAMIC)
    assert row["sqnr_after"] > 25
    assert result.layers["blocks.1"].scheme == FP8_DYNAMIC
    assert {result.layers[name].scheme for name in ("blocks.0", "blocks.2")} == {FP8_STATIC}
    (line,) = [line for line in result.warnings if "would lose" in line]
    assert "1 layer " in line
    assert "blocks.1" in line
    assert "scale for each token" in line


def test_a_lost_layer_stays_float_where_nothing_else_is_allowed(inputs):
    result = result_of(1e5, FLOAT_ONLY, inputs)
    (row,) = result.report["guard"]
    assert (row["name"], row["scheme"], row["sqnr_after"]) == ("blocks.1", None, None)
    assert sorted(result.layers) == ["blocks.0", "blocks.2"]
    (line,) = [line for line in result.warnings if "would lose" in line]
    assert "stayed float" in line
    by_name = {entry["name"]: entry for entry in result.report["layers"]}
    assert by_name["blocks.1"]["scheme"] is None
    assert "would lose it" in by_name["blocks.1"]["reason"]


def test_integers_are_not_guarded(inputs):
    assert result_of(1e5, replace(EITHER, element="int8"), inputs).report["guard"] == []


def test_the_bound_is_20_db():
    assert pytest.approx(10**-2) == LOST
