"""The learning curve has the output SQNR that shorter captures would give, and its verdict says how many are enough."""

import json
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch

from octavo.calibrate.calibration import calibrate
from octavo.calibrate.layers.install import quantized
from octavo.calibrate.learning_curve import verdict
from octavo.calibrate.replay.current_call import CurrentCall
from octavo.calibrate.replay.measured_calls import measured_calls
from octavo.calibrate.replay.snapshots import CallCount, Snapshots, affordable
from octavo.calibrate.replay.sqnr import Power
from octavo.calibrate.settings import Settings

from ..zoo.hard_sd3 import bits, same
from ..zoo.toy import source_of, toy


class Call(NamedTuple):
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    unit: int | None


def calls(units: int, per_unit: int = 2, growth: float = 0.0) -> list[Call]:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(2, 3, 4, 5, generator=generator) for _ in range(per_unit * units)]
    return [Call((x * (1 + growth * position),), {}, position // per_unit) for position, x in enumerate(inputs)]


def rows(*values: float, prompts: bool = True) -> list[dict[str, Any]]:
    return [
        {"calls": 28 * 2**index, "prompts": 2**index if prompts else None, "output_sqnr": value}
        for index, value in enumerate(values)
    ]


def test_snapshots_are_taken_after_1_2_4_8_prompts_or_calls():
    history: list[Call] = []
    snapshots = Snapshots(lambda: len(history))
    for call in snapshots.taking(calls(9, 3)):
        history.append(call)
    assert snapshots.by_count == {CallCount(3 * n, n): 3 * n for n in (1, 2, 4, 8)}
    assert snapshots.last == CallCount(27, 9)
    snapshots = Snapshots(lambda: None)
    list(snapshots.taking(call._replace(unit=None) for call in calls(4)))
    assert list(snapshots.by_count) == [CallCount(n, None) for n in (1, 2, 4)]
    assert snapshots.last == CallCount(8, None)


def test_what_is_measured_again_is_about_a_tenth_of_the_replay():
    snapshots = [CallCount(2**n, None) for n in range(9)]
    assert affordable(snapshots, 159, 16) == affordable(snapshots, 448, 0) == []
    assert affordable(snapshots, 160, 16) == snapshots[-1:]
    assert affordable(snapshots, 448, 8) == snapshots[-5:]


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("more", [{}, {"observer": "mse"}, {"observer": "sigma"}], ids=str)
def test_the_curve_rises_to_the_final_value(more, release):
    settings = Settings(defaults={}, sqnr_calls=2, release=release, **more)
    report = calibrate(toy(), source_of(calls(40, growth=0.2)), settings).report
    curve = json.loads(json.dumps(report, allow_nan=False))["enough"]
    assert [row["prompts"] for row in curve] == [8, 16, 32, 40]
    assert [row["calls"] for row in curve] == [16, 32, 64, 80]
    values = [row["output_sqnr"] for row in curve]
    assert values[-1] == report["totals"]["output_sqnr"]
    assert values[:-1] == sorted(values[:-1])
    assert values[-1] > values[-2] - 3  # ranges still widen once they hold the measured calls
    assert values[0] < values[-1] - 10


@pytest.mark.parametrize("observer", ["minmax", "sigma", "percentile", "mse"])
def test_measuring_the_curve_changes_no_integer(observer):
    settings = Settings(defaults={}, observer=observer, sqnr_calls=1)
    watched = calibrate(toy(), source_of(calls(12)), settings)
    once = calibrate(toy(), source_of([call._replace(unit=3) for call in calls(12)]), settings)
    assert watched.report["enough"]
    assert not once.report["enough"]
    assert same(bits(watched.layers), bits(once.layers))


@pytest.mark.parametrize("units", [4, 8, 16])
@pytest.mark.parametrize("smoothing", [False, True])
def test_a_point_of_the_curve_is_what_a_shorter_capture_would_have_given(units, smoothing):
    model, every = toy(), calls(20)
    result = calibrate(model, source_of(every), Settings(defaults={}, smoothing=smoothing, sqnr_calls=1))
    shorter = calibrate(model, source_of(every[: 2 * units]), Settings(defaults={}, smoothing=smoothing, sqnr_calls=0))
    current, power = CurrentCall(model), Power()
    list(current.tracked(every))
    (call,) = (every[position] for position in measured_calls(current, 1))
    with torch.no_grad():
        exact = model(*call.args)
        with quantized(model, shorter.layers):
            power.add(exact, model(*call.args))
    assert {"calls": 2 * units, "prompts": units, "output_sqnr": power.sqnr} in result.report["enough"]


@pytest.mark.parametrize(
    "more",
    [
        {"activations": "dynamic"},
        {"activations": "float"},
        {"sqnr_calls": 0},
        {"smoothing": True, "observer": "mse"},
        {"fallback": 1},
    ],
    ids=str,
)
def test_without_ranges_or_where_they_take_another_replay_there_is_no_curve(more):
    assert calibrate(toy(), source_of(calls(12)), Settings(defaults={}, **more)).report["enough"] == []


def test_weights_by_a_method_are_compared_as_rounded_to_the_nearest():
    model, every = toy(), calls(12)
    settings = Settings(defaults={}, smoothing=True, sqnr_calls=1)
    plain = calibrate(model, source_of(every), settings).report
    method = calibrate(model, source_of(every), replace(settings, weights=("gptq",))).report
    assert plain["enough"]
    assert plain["enough"] == method["enough"]
    assert plain["enough"][-1]["output_sqnr"] == plain["totals"]["output_sqnr"]


def test_few_calls_give_no_curve_and_no_verdict():
    assert calibrate(toy(), source_of(calls(7)), Settings(defaults={})).report["enough"] == []
    assert verdict([]) is None


@pytest.mark.parametrize(
    ("curve", "words"),
    [
        (
            rows(20.0, 29.95, 30.1, 30.0),
            "2 of 8 prompts were enough (56 of 224 calls): output SQNR with the first 2 is within 0.1 dB",
        ),
        (rows(30.0, 20.0, 30.0, 30.0), "4 of 8 prompts were enough"),
        (
            rows(20.0, 29.5, 30.0),
            "More calls would help: output SQNR with all 4 prompts is 0.5 dB higher than with the first 2.",
        ),
        (
            rows(29.8, 30.0),
            "The last calls still helped: output SQNR with all 2 prompts is 0.20 dB higher than with the first 1.",
        ),
        (rows(30.0, 30.0, prompts=False), "28 of 56 calls were enough: output SQNR with the first 28"),
    ],
)
def test_the_verdict(curve, words):
    assert str(verdict(curve)).startswith(words)
