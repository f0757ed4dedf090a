"""The advice names layers that cause most of the error, and a rerun that follows it gains what it promises."""

import pytest
import torch

from octavo.calibrate.advice import MIN_CALLS, MIN_GAIN, advice_line, patterns_of
from octavo.calibrate.calibration import calibrate
from octavo.calibrate.plan import make_plan, matches
from octavo.calibrate.settings import Settings

from ..zoo.toy import calls, source_of, toy

PLAIN = Settings(defaults={})


def with_outlier(factor=60.0):
    """Returns a Toy in which the input of blocks.0.down has one channel far above the others."""
    model = toy()
    with torch.no_grad():
        model.blocks[0].up.weight[0] *= factor
        model.blocks[0].down.weight[:, 0] /= factor
    return model


@pytest.fixture(scope="module")
def result():
    return calibrate(with_outlier(), source_of(calls(16)), PLAIN)


def test_a_rerun_gains_what_the_advice_promises(result):
    advice = result.report["advice"]
    assert advice["keep_float"] == ["*.0.down"]
    assert (advice["layers"], advice["held_out"]) == (1, True)
    rerun = calibrate(with_outlier(), source_of(calls(16)), Settings(defaults={}, keep_float=("*.0.down",)))
    before, after = result.report["totals"], rerun.report["totals"]
    assert after["output_sqnr"] - before["output_sqnr"] == pytest.approx(advice["gain"], abs=0.5)
    assert after["bytes_after"] - before["bytes_after"] == advice["bytes"]


def test_released_layers_give_the_same_advice(result):
    released = calibrate(with_outlier(), source_of(calls(16)), Settings(defaults={}, release=True))
    assert released.report["advice"] == result.report["advice"]


def test_the_shares_of_the_layers_add_up_and_the_worst_has_the_most(result):
    shares = {row["name"]: row["output_share"] for row in result.report["layers"] if "output_share" in row}
    assert set(shares) == set(result.layers)
    assert sum(shares.values()) == pytest.approx(1.0, abs=0.001)
    assert max(shares, key=shares.__getitem__) == "blocks.0.down"


def test_few_calls_give_no_advice():
    report = calibrate(with_outlier(), source_of(calls(MIN_CALLS - 1)), PLAIN).report
    assert report["advice"] is None
    assert not any("output_share" in row for row in report["layers"])


def test_parameters_of_the_model_get_no_gradients():
    model = with_outlier().requires_grad_(True)
    calibrate(model, source_of(calls(MIN_CALLS)), PLAIN)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_gain_below_half_a_decibel_is_no_advice(result):
    layers = ("blocks.0.down", "blocks.0.up", "patch")
    report = calibrate(with_outlier(), source_of(calls(16)), Settings(defaults={}, keep_float=layers)).report
    assert report["advice"] is None or report["advice"]["gain"] >= MIN_GAIN


@pytest.mark.parametrize(
    ("names", "patterns"),
    [
        (["blocks.0.up"], {"*.0.up"}),
        (["blocks.0.up", "blocks.1.up"], {"*.up"}),
        (["blocks.0.up", "blocks.1.up", "blocks.1.down"], {"*.up", "*.1.down"}),
        (["patch"], {"patch"}),
    ],
)
def test_patterns_are_short_and_match_no_other_layer(names, patterns):
    plan = make_plan(toy(), defaults={})
    found = patterns_of(names, plan)
    assert set(found) == patterns
    assert [name for name in plan.quantized if any(matches(name, pattern) for pattern in found)] == sorted(
        names, key=plan.quantized.index
    )


def test_the_line_can_be_pasted_into_a_shell(result):
    assert "add --keep-float '*.0.down'. 1 layer stays float" in advice_line(result.report["advice"])
    assert advice_line(None) is None
