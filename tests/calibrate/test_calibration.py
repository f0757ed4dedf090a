"""A whole calibration gives a complete report, warnings, and layers that do not depend on the order of calls."""

import json
import math
import re

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from octavo.calibrate.calibration import calibrate
from octavo.calibrate.layers.install import quantized
from octavo.calibrate.layers.modules import QuantizedLinear
from octavo.calibrate.observers.extremes import extremes
from octavo.calibrate.replay.calls import evenly_spaced
from octavo.calibrate.replay.hooks import hooked
from octavo.calibrate.replay.sqnr import Power, tensors_in
from octavo.calibrate.report import worst
from octavo.calibrate.resources import peak_memory
from octavo.calibrate.settings import Settings
from octavo.pipelines.families import value_groups

from ..helpers.refusals import refused
from ..zoo.toy import DTYPES, Call, calls, source_of, toy


def test_the_report_has_every_layer_and_adds_up():
    model = toy()
    result = calibrate(model, source_of(calls()), Settings(observer="sigma", defaults={"proj_out": "why"}))
    report = json.loads(json.dumps(result.report, allow_nan=False))
    rows = {row["name"]: row for row in report["layers"]}
    assert set(rows) == {name for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    assert rows["proj_out"]["reason"] == "why"
    assert rows["unused"]["reason"] == "never ran on the calibration calls"
    totals = report["totals"]
    assert totals["quantized"] == len(result.layers) == len(result.plan.quantized) == 5
    assert totals["kept_float"] == 2
    assert totals["calls"] == 3
    assert totals["bytes_before"] == sum(
        p.nbytes for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) for p in m.parameters()
    )
    for name, layer in result.layers.items():
        row = rows[name]
        assert row["scale"] == layer.input_scale.item()
        assert row["zero_point"] == int(layer.input_zero_point)
        assert row["range"][0] <= row["range"][1]
        assert row["sqnr"] > 20
        assert row["bytes_after"] < row["bytes_before"]
    assert worst(report, 2) == sorted((rows[name] for name in result.layers), key=lambda row: row["sqnr"])[:2]
    assert set(report["seconds"]) == {"prepare", "replay", "freeze", "measure", "enough", "advice"}
    assert report["peak_memory"] > 1 << 20


def test_the_output_s_sqnr_is_that_of_the_layers_that_are_exported():
    model = toy()
    result = calibrate(model, source_of(calls()), Settings(defaults={}, sqnr_calls=3))
    power = Power()
    with torch.no_grad():
        for call in calls():
            exact = model(*call.args, **call.kwargs)
            with quantized(model, result.layers):
                power.add(exact, model(*call.args, **call.kwargs))
    assert result.report["totals"]["output_sqnr"] == power.sqnr
    assert power.sqnr > 25


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("observer", ["minmax", "sigma", "percentile", "mse"])
def test_every_observer_in_every_dtype(dtype, observer):
    settings = Settings(observer=observer, defaults={}, symmetric=observer == "mse")
    result = calibrate(toy(dtype=dtype), source_of(calls(dtype=dtype)), settings)
    assert result.report["totals"]["output_sqnr"] > 20


def test_releasing_the_float_layers_gives_the_same_report_and_layers():
    one, other = toy(), toy()
    original = calibrate(one, source_of(calls()), Settings(defaults={}))
    released = calibrate(other, source_of(calls()), Settings(defaults={}, release=True))
    assert isinstance(other.proj_out, QuantizedLinear)
    assert other.proj_out is released.layers["proj_out"]
    assert original.report["layers"] == released.report["layers"]
    assert original.report["totals"] == released.report["totals"]
    assert list(original.layers) == list(released.layers)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("observer", ["minmax", "sigma", "mse"])
def test_the_order_of_the_calls_and_their_batches_do_not_matter(order, observer):
    settings = Settings(observer=observer, sigma=2.0, defaults={}, sqnr_calls=0)
    # a single layer, as a matmul before it would round differently in other batches
    model, samples = nn.Sequential(nn.Linear(6, 3)), [Call((torch.randn(4, 5, 6) * 10.0**k,), {}) for k in range(3)]
    parts = [Call((row[None],), {}) for call in samples for row in call.args[0]][::order]
    one = calibrate(model, source_of(samples), settings).report["layers"]
    assert one == calibrate(model, source_of(parts), settings).report["layers"]


def test_a_layer_that_never_ran_is_an_error_if_strict():
    refused(
        lambda: calibrate(toy(), source_of(calls()), Settings(defaults={}, strict=True)),
        6,
        "layer unused: never ran on the calibration calls. Keep it float",
    )


def test_an_input_of_zeros_keeps_its_layer_float_with_a_warning_so_that_its_bias_is_exact():
    model = toy()
    model.blocks[0].down.weight.data.zero_()
    model.blocks[0].up.weight.data.zero_()
    model.blocks[0].up.bias.data.zero_()
    result = calibrate(model, source_of(calls()), Settings(defaults={}))
    assert "blocks.0.down" not in result.layers
    assert "blocks.0.down: its input was zero in every call; it stays float." in result.warnings
    with torch.no_grad(), quantized(model, result.layers):
        assert bool((model.blocks[0].down(torch.zeros(2, 32)) == model.blocks[0].down.bias).all())


def test_layers_of_tiny_weights_and_a_large_bias_become_integers():
    model = toy()
    model.blocks[0].up.weight.data.mul_(1e-9)
    model.blocks[0].up.bias.data.add_(100.0)
    result = calibrate(model, source_of(calls()), Settings(defaults={}))
    assert "blocks.0.up" in result.layers


def test_layers_whose_numbers_do_not_fit_stay_float_with_a_warning():
    half = toy(dtype=torch.float16)
    tiny = [Call((call.args[0] * 1e-6,), {}) for call in calls(dtype=torch.float16)]
    result = calibrate(half, source_of(tiny), Settings(defaults={}))
    assert "patch: float16 cannot represent the scale of its input range; it stays float." in result.warnings


def test_unsupported_kinds_are_listed_once_and_stay_float():
    model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1), nn.Flatten(), nn.Linear(4, 2))
    result = calibrate(model, source_of([Call((torch.randn(2, 4, 1),), {})]), Settings())
    assert result.warnings == ["Conv1d has no integer form: 2 layers stay float."]
    assert list(result.layers) == ["3"]


@pytest.mark.parametrize("key", ["blocks.0.up.weight", "proj_out.bias"])
def test_weights_that_are_not_finite_are_refused_before_the_first_call(key):
    model = toy()
    model.state_dict()[key].view(-1)[1] = math.inf

    def never() -> list[Call]:
        raise AssertionError("replayed")

    refused(
        lambda: calibrate(model, never, Settings(defaults={})), 6, re.compile(f"{key}: 1 of .* values are not finite")
    )


def test_samples_limit_the_calls():
    assert calibrate(toy(), source_of(calls()), Settings(defaults={}, samples=2)).report["totals"]["calls"] == 2


def test_at_most_three_calls_are_in_memory():
    alive, most = 0, 0

    class Counted(dict):
        def __init__(self, *args) -> None:
            nonlocal alive, most
            super().__init__(*args)
            alive += 1
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def samples():
        for call in calls(12):
            yield Call(call.args, Counted(call.kwargs))

    calibrate(toy(), samples, Settings(defaults={}))
    assert most <= 3


@pytest.mark.parametrize("smoothing", [False, True], ids=["plain", "fast"])
def test_static_ranges_take_one_replay_of_convolutions_too(smoothing):
    model, runs = toy(), []
    given_calls = calls(40)
    with hooked(model, {"": lambda *_: runs.append(1)}):
        result = calibrate(model, source_of(given_calls), Settings(defaults={}, smoothing=smoothing, sqnr_calls=0))
    assert len(runs) == len(given_calls) + 1  # the first call runs once more, to find code that reads weights
    assert "patch" in result.layers
    ends = extremes(torch.cat([call.args[0] for call in given_calls]))
    assert next(row for row in result.report["layers"] if row["name"] == "patch")["range"] == list(ends)


def test_progress_wraps_every_long_stage():
    stages = []

    def progress(label, items, total=None):
        stages.append(label)
        return items

    calibrate(toy(), source_of(calls()), Settings(defaults={}, release=True), progress=progress)
    assert stages == ["replay", "freeze", "measure", "install"]


@pytest.mark.parametrize(
    "settings",
    [
        {"observer": "best"},
        {"weights": "floor"},
        {"sigma": 100.5},
        {"sigma": math.nan},
        {"samples": 0},
    ],
    ids=str,
)
def test_settings_without_meaning(settings):
    refused(lambda: Settings(**settings), 2, next(iter(settings)))


def test_measuring_is_spread_over_the_calls():
    assert evenly_spaced(84, 4) == [10, 31, 52, 73]
    assert evenly_spaced(3, 8) == [0, 1, 2]
    assert evenly_spaced(0, 8) == evenly_spaced(5, 0) == []


def test_outputs_of_any_form_are_compared():
    x, y = torch.ones(1), torch.zeros(2, dtype=torch.long)
    assert [t is x for t in tensors_in(({"a": x, "b": [x, None, y]}, 3))] == [True, True]


def test_sqnr_in_decibels():
    power = Power()
    assert power.sqnr is None
    other = torch.full((4,), 11.0)
    power.add(torch.full((4,), 10.0), other)
    assert bool((other == 11.0).all())
    assert power.sqnr == pytest.approx(20.0)
    assert peak_memory() > 0


class WithAttention(nn.Module):
    """An attention whose values have outliers in three channels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attn = Attention(query_dim=32, heads=2, dim_head=16)
        with torch.no_grad():
            self.attn.to_v.weight[:3] *= 50
            self.attn.to_out[0].weight[:, :3] /= 50

    def forward(self, x):
        return self.attn(x)


@pytest.mark.parametrize("release", [False, True])
def test_factors_are_folded_into_value_layers_also_if_float_layers_are_released(release):
    torch.manual_seed(1)
    attentions = [Call((torch.randn(2, 20, 32),), {}) for _ in range(4)]
    settings = Settings(defaults={}, smoothing=True, groups=value_groups, fold=True, release=release)
    result = calibrate(WithAttention().eval(), source_of(attentions), settings)
    assert "attn.to_v" in {name.rpartition(".")[0] for name in result.parameters} | set(result.layers)
    assert result.layers["attn.to_out.0"].transform is None
    assert {row["name"]: row for row in result.report["layers"]}["attn.to_out.0"]["sqnr"] > 30


def test_layers_that_stay_float_for_the_same_reason_share_a_warning():
    convolutions = [nn.Conv2d(channels, 8, 3, padding=1) for channels in (3, 8, 8)]
    model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(8 * 32 * 32, 4))
    given_calls = [Call((x,), {}) for x in torch.randn(2, 1, 3, 32, 32)]
    result = calibrate(model, lambda: given_calls, Settings(defaults={}, element="mxfp8", activations="dynamic"))
    assert result.warnings == ["0 and 2 more layers: a convolution, which mxfp8 cannot hold; these stay float."]
