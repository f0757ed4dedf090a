"""Ranges by noise level: bins of levels, found at some steps and good for others."""

import itertools
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch

from octavo.calibrate.calibration import calibrate
from octavo.calibrate.formats.ascend.read import load_ascend
from octavo.calibrate.formats.export import export
from octavo.calibrate.layers.install import quantized
from octavo.calibrate.layers.scheme import ACTIVATION, Range
from octavo.calibrate.layers.transforms import Multiply
from octavo.calibrate.observers.observers import OBSERVERS, MinMax
from octavo.calibrate.observers.ranges import BINS, Bins, bins_for, edges_of, input_with, observe_ranges, ranges_of
from octavo.calibrate.replay.sqnr import Power, outputs
from octavo.calibrate.result import Result
from octavo.calibrate.settings import Settings

from ...zoo.hard_sd3 import calibrated, hard, prompts
from ...zoo.hard_sd3 import sqnr as hard_sqnr
from ...zoo.layer_kinds import TimedToy
from ...zoo.toy import Call

OPTIONS = Settings().options


class Loud(TimedToy):
    """A model whose layers have inputs that grow with the noise level."""

    def forward(self, hidden, timestep, extra=None):
        level = timestep.view(-1, 1, 1) / 1000
        x = hidden * level**2
        return self.out(torch.nn.functional.silu(self.up(x)) @ torch.ones(16, 8) * 0.1 + x)


class Prompted(NamedTuple):
    """A call of the prompt `unit`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    unit: int


def steps(count: int, seed: int = 0) -> list[Prompted]:
    """One call of prompt `seed` for each of `count` noise levels, as a schedule of so many steps has them."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Prompted((torch.randn(2, 20, 8, generator=generator), torch.full((2,), 1000.0 * (1 - at / count))), {}, seed)
        for at in range(count)
    ]


def timed(count: int = 28, **settings) -> tuple[Loud, Result]:
    model = Loud()
    chosen = {"defaults": {}, "activations": "timestep"} | settings
    return model, calibrate(model, lambda: steps(count) + steps(count, 1), Settings(**chosen))


def sqnr(model: torch.nn.Module, result: Result, samples: list[Prompted]) -> float:
    power = Power()
    exact = outputs(model, samples)
    with quantized(model, result.layers):
        for one, other in zip(exact, outputs(model, samples), strict=True):
            power.add(one[0] / one[0].abs().max(), other[0] / one[0].abs().max())  # every level counts as much
    return power.sqnr or 0.0


@pytest.mark.parametrize("levels", [1, 2, 7, 8, 9, 28, 1000])
def test_bins_hold_about_as_many_levels_each(levels):
    edges = edges_of([float(at) for at in range(levels)] * 3)
    assert len(edges) == min(levels, BINS) - 1
    assert bool((edges.diff() > 0).all())
    counts = torch.bucketize(torch.arange(levels).float(), edges, right=True).bincount()
    assert len(counts) == min(levels, BINS)
    assert int(counts.max() - counts.min()) <= 1


def test_a_bin_s_range_is_that_of_its_calls_and_one_that_saw_nothing_has_that_of_all():
    model = Loud()
    bins = Bins(torch.tensor([250.0, 500.0, 2000.0]), {at: at // 8 for at in range(32)})
    samples = [call for seed in range(4) for call in steps(8, seed)]
    ranges, current, _ = observe_ranges(model, ["up", "patch"], samples, "minmax", OPTIONS, {}, bins)
    assert current.count == 32
    assert set(ranges) == {"up"}  # patch never ran
    for at, (low, high) in enumerate([(0, 250), (250, 500), (500, 2000)]):
        inside = [x * (t.view(-1, 1, 1) / 1000) ** 2 for (x, t), *_ in samples if low <= float(t[0]) < high]
        assert ranges["up"][at] == pytest.approx(
            (min(float(x.min()) for x in inside), max(float(x.max()) for x in inside))
        )
    assert ranges["up"][3].low == min(each.low for each in ranges["up"][:3])
    assert ranges["up"][3].high == max(each.high for each in ranges["up"][:3])


@pytest.mark.parametrize("observer", OBSERVERS)
def test_every_observer_hears_what_is_multiplied(observer):
    model, none = Loud(), Bins(torch.zeros(0))
    halving = {"up": Multiply(torch.full((8,), 0.5))}
    plain = observe_ranges(model, ["up"], steps(8), observer, OPTIONS, {}, none)[0]["up"]
    halved = observe_ranges(model, ["up"], steps(8), observer, OPTIONS, halving, none)[0]["up"]
    assert halved[0] == pytest.approx((plain[0].low / 2, plain[0].high / 2))


def test_bins_found_in_28_steps_serve_20_and_50():
    model, result = timed()
    assert len(result.timesteps) == 28
    scales = result.layers["up"].input_scale
    assert len(scales) == BINS
    assert bool((scales.diff() >= 0).all())  # the higher the level the wider the range
    assert scales[0] < scales[-1] / 20
    static = timed(activations="static")[1]
    for count in (28, 20, 50):
        fresh = steps(count, seed=2)
        assert sqnr(model, result, fresh) > 25
        assert sqnr(model, result, fresh) > sqnr(model, static, fresh) + 5


def test_rows_with_noise_levels_of_their_own_are_each_in_their_bin():
    model, result = timed()
    (x, _), *_ = steps(1)[0]
    with torch.no_grad(), quantized(model, result.layers):
        both = model(x, torch.tensor([900.0, 100.0]))
        each = [model(x[at : at + 1], torch.tensor([level])) for at, level in ((0, 900.0), (1, 100.0))]
    assert torch.equal(both, torch.cat(each))


def test_a_level_on_an_edge_and_levels_beyond_all_have_a_bin():
    model, result = timed()
    (x, _), *_ = steps(1)[0]
    levels = [-5.0, 0.0, *result.layers["up"].edges.tolist(), 1000.0, 2000.0]
    with torch.no_grad(), quantized(model, result.layers):
        assert all(bool(model(x, torch.tensor([level])).isfinite().all()) for level in levels)


@pytest.mark.parametrize("settings", [{}, {"smoothing": True}, {"symmetric": True, "observer": "mse"}], ids=str)
def test_what_is_exported_for_a_schedule_computes_that_schedule(tmp_path, settings):
    model, result = timed(**settings)
    assert any(layer.mul_scale is not None for layer in result.layers.values()) <= bool(settings.get("smoothing"))
    for count in (20, 50):
        schedule = tuple(float(call.args[1][0]) for call in steps(count))
        folder = export(replace(result, timesteps=schedule), model, tmp_path / str(count))
        loaded = load_ascend(folder)
        with quantized(model, result.layers):
            wanted = outputs(model, steps(count, 3))
        with quantized(model, loaded):
            assert all(torch.equal(a[0], b[0]) for a, b in zip(wanted, outputs(model, steps(count, 3)), strict=True))


def test_calls_without_a_noise_level_have_one_bin():
    class Timeless(Loud):
        def forward(self, hidden):
            return super().forward(hidden, torch.full((2,), 500.0))

    samples = [Call(call.args[:1], {}) for call in steps(6)]
    result = calibrate(Timeless(), lambda: samples, Settings(defaults={}, activations="timestep"))
    assert result.timesteps is None
    assert {layer.scheme for layer in result.layers.values()} == {"W8A8"}


def test_a_range_too_small_for_the_dtype_has_no_parameters():
    ranges = [Range(-0.5, 1.0), Range(-1.0, 2.0)]
    assert input_with(ranges, edges_of([0.0, 500.0]), ACTIVATION, torch.float32) is not None
    tiny = [each._replace(low=each.low * 1e-8, high=each.high * 1e-8) for each in ranges]
    assert input_with([ranges[0], tiny[0]], edges_of([0.0, 500.0]), ACTIVATION, torch.float16) is None


def cells(extents: list[list[float]]) -> list[list[MinMax]]:
    """Observers of bins and folds, each of which saw values from -1 to 1 times its extent; 0: it saw nothing."""
    made = [[MinMax(OPTIONS) for _ in row] for row in extents]
    for observer, extent in zip(itertools.chain(*made), itertools.chain(*extents), strict=True):
        if extent:
            observer.add(MinMax.read(torch.tensor([-extent, extent])))
    return made


def highs(extents: list[list[float]]) -> list[float]:
    return [each.high for each in ranges_of(cells(extents), ACTIVATION)]


def test_a_bin_has_its_own_range_only_where_the_range_of_its_other_calls_holds_each_call():
    assert highs([[1.0] * 4, [4.0] * 4]) == [1.0, 4.0]
    assert highs([[1.0, 1.1, 1.2, 1.1], [4.0, 4.4, 4.2, 4.1]]) == pytest.approx([1.2, 4.4])
    alike = [[1.0, 1.1, 3.0, 0.9], [4.0, 0.8, 1.2, 1.0]]  # what differs are the calls, not the bins
    assert highs(alike) == [4.0, 4.0]


def test_a_bin_without_evidence_has_the_range_of_all():
    assert highs([[1.0, 0.0, 0.0, 0.0], [4.0] * 4]) == [4.0, 4.0]
    assert highs([[0.0] * 4, [4.0] * 4, [1.0] * 4]) == [4.0, 4.0, 1.0]
    with pytest.raises(ValueError, match="no input was observed"):
        ranges_of(cells([[0.0], [0.0]]), ACTIVATION)


def test_calls_of_one_prompt_are_in_one_fold_of_a_bin_and_folds_are_of_equal_size():
    levels = {at: float(at % 8) for at in range(64)}
    named = bins_for(levels, [at // 8 for at in range(64)])
    assert all(len({named.folds[at] for at in range(8 * unit, 8 * unit + 8)}) == 1 for unit in range(8))
    unnamed = bins_for(levels, [None] * 64)
    for bins in (named, unnamed):
        folds = [sorted(bins.folds[at] for at in range(64) if at % 8 == level) for level in range(8)]
        assert folds == [[0, 0, 1, 1, 2, 2, 3, 3]] * 8


@pytest.mark.parametrize("calls", [16, 32])
@pytest.mark.parametrize("outliers", [0, 2])
def test_ranges_by_noise_level_are_no_worse_than_static_ones_on_other_prompts(calls, outliers):
    model = hard(outliers=outliers)
    samples, held = prompts(calls // 8, 8), prompts(4, 8, seed=7)
    static, timestep = (
        hard_sqnr(model, calibrated(model, samples, smoothing=True, activations=word, sqnr_calls=0).layers, held)
        for word in ("static", "timestep")
    )
    assert timestep > static - 0.2
