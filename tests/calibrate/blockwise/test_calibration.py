"""Calibration block by block gives what calibration of the whole model gives."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from octavo.calibrate.blockwise.calibration import BlockwiseCalibration
from octavo.calibrate.calibration import calibrate
from octavo.calibrate.formats.arithmetic import corrected
from octavo.calibrate.formats.export import export
from octavo.calibrate.layers.install import quantized
from octavo.calibrate.replay.calls import copied_to
from octavo.calibrate.resources import resident_memory
from octavo.calibrate.result import Result
from octavo.calibrate.settings import RECIPES, Settings
from octavo.pipelines import GENERIC
from octavo.pipelines.denoisers import denoisers
from octavo.pipelines.opensora.family import OPENSORA
from octavo.pipelines.sd3 import SD3

from ...helpers.refusals import refused
from ...zoo.opensora import SMALL, tiny_pipeline
from ...zoo.pipelines import TINY, make, run
from ...zoo.toy import Call, calls, given, toy

ROOM = 1 << 40
SAME = ("layers", "totals", "warnings", "settings")


def block_by_block(model: nn.Module, samples: list[Call], settings: Settings, place: Path, **options) -> Result:
    return BlockwiseCalibration(model, given(samples), settings, place=place, limit=ROOM, **options).run()


def heard(pipe, model: nn.Module, arguments: dict) -> list[Call]:
    """What the pipeline calls its denoiser with."""
    samples: list[Call] = []

    def hear(_: nn.Module, args: tuple, kwargs: dict) -> None:
        values = [copied_to(x, torch.device("cpu")) for x in args]
        named = {key: x.clone() if isinstance(x, Tensor) else x for key, x in kwargs.items()}
        samples.append(Call(tuple(values), named, len(samples)))

    handle = model.register_forward_pre_hook(hear, with_kwargs=True)
    run(pipe, arguments)
    handle.remove()
    return samples


def assert_same(one: Result, other: Result) -> None:
    assert one.plan == other.plan
    assert list(one.layers) == list(other.layers)
    for name, layer in one.layers.items():
        state, again = layer.state_dict(), other.layers[name].state_dict()
        assert state.keys() == again.keys()
        assert all(torch.equal(value, again[key]) for key, value in state.items()), name
    assert {key: one.report[key] for key in SAME} == {key: other.report[key] for key in SAME}
    assert one.timesteps == other.timesteps


@pytest.mark.parametrize("name", [name for name in TINY if name != "writes-into-its-input"])
def test_every_pipeline_gets_the_same_integers(name, tmp_path):
    pipe, arguments = make(name)
    model = next(iter(denoisers(pipe).values()))
    samples = heard(pipe, model, arguments)
    family = SD3 if name == "sd3" else GENERIC
    settings = Settings(defaults=family.keep_float, groups=family.groups, release=True, **RECIPES["fast"])
    whole = calibrate(copy.deepcopy(model), given(samples), settings)
    assert_same(whole, block_by_block(model, samples, settings, tmp_path))
    assert not list(tmp_path.glob("spill-*"))  # what is of no more use is no longer there


OTHERS = {
    "plain": RECIPES["plain"],
    "balanced": RECIPES["balanced"],
    "best": RECIPES["best"],
    "timestep": RECIPES["balanced"] | {"activations": "timestep"},
    "weight-only": {"activations": "float"},
    "mse": {"observer": "mse"},
    "all layers": RECIPES["fast"] | {"defaults": {}},
}


@pytest.mark.parametrize("said", OTHERS)
def test_every_recipe_gets_the_same_integers(said, tmp_path):
    pipe, arguments = make("sd3")
    samples = heard(pipe, pipe.transformer, arguments)
    settings = Settings(**{"defaults": SD3.keep_float, "groups": SD3.groups, "release": True} | OTHERS[said])
    whole = calibrate(copy.deepcopy(pipe.transformer), given(samples), settings)
    assert_same(whole, block_by_block(pipe.transformer, samples, settings, tmp_path))


@pytest.mark.parametrize("recipe", ["plain", "fast"])
def test_blocks_that_share_factors_have_their_own(recipe, tmp_path):
    pipe = tiny_pipeline()
    model = pipe.transformer
    samples = heard(pipe, model, {"prompt": "a wave"} | SMALL)
    settings = Settings(defaults=OPENSORA.keep_float, groups=OPENSORA.groups, release=True, **RECIPES[recipe])
    whole = calibrate(copy.deepcopy(model), given(samples), settings)
    made = block_by_block(model, samples, settings, tmp_path)
    if recipe == "plain":
        return assert_same(whole, made)
    assert made.warnings == [*whole.warnings, *(line for line in made.warnings if "3 groups of layers span" in line)]
    assert len(made.warnings) == len(whole.warnings) + 1
    assert made.report["totals"]["output_sqnr"] > whole.report["totals"]["output_sqnr"] - 1


def test_what_rounding_needs_is_said_before_the_first_call(tmp_path):
    plain, balanced = (Settings(defaults={}, **RECIPES[name]) for name in ("fast", "balanced"))

    def started(settings: Settings, limit: float) -> BlockwiseCalibration:
        return BlockwiseCalibration(toy(width=1024), given(calls()), settings, place=tmp_path, limit=limit)

    sums = 2 * 2048**2 * 8  # of the layer with the most inputs, down
    limit = resident_memory() + 3 * sums
    started(plain, limit)
    refused(lambda: started(balanced, limit), 7, "to round its widest layer")


def test_the_model_that_is_left_computes_with_the_integers(tmp_path):
    model, before = toy(), toy()
    result = block_by_block(model, calls(), Settings(defaults={}), tmp_path)
    assert set(result.layers) >= {"patch", "blocks.0.up", "proj_out"}  # outside the blocks too
    with torch.no_grad(), quantized(before, result.layers):
        for call in calls():
            assert torch.equal(model(*call.args, **call.kwargs), before(*call.args, **call.kwargs))


def resident(files: list[Path]) -> int:
    """Bytes of mapped files that are in this process's memory."""
    total, counted = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:  # the first line of a mapping
            counted = any(line.endswith(str(file)) for file in files)
        elif counted and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_what_the_blocks_became_stays_out_of_memory(tmp_path):
    model = toy(width=1024)
    place = tmp_path / "place"
    place.mkdir()
    result = block_by_block(model, calls(), Settings(observer="minmax", **RECIPES["fast"]), place)
    written = sorted(place.iterdir())
    size = sum(file.stat().st_size for file in written)
    assert size > 8 << 20
    little = size / 4  # neighbours of what is read come with it
    assert resident(written) < little
    assert not any(corrected(layer) for layer in result.layers.values())  # what an export looks at first
    assert resident(written) < little
    export(result, model, tmp_path / "out")
    assert resident(written) < little
