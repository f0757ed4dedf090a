"""Calibration block by block gives the same integers and report as calibration of the whole model."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from octavo.calibrate.blockwise.calibration import BlockwiseCalibration
from octavo.calibrate.calibration import calibrate
from octavo.calibrate.formats.corrections import has_bias_correction
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
from ...helpers.slow import marked
from ...zoo.opensora import SMALL, tiny_pipeline
from ...zoo.pipelines import TINY, make, run
from ...zoo.toy import Block, Call, calls, source_of, toy

MEMORY_LIMIT = 1 << 40
SAME = ("layers", "totals", "warnings", "settings")


def block_by_block(model: nn.Module, samples: list[Call], settings: Settings, place: Path, **options) -> Result:
    return BlockwiseCalibration(
        model, source_of(samples), settings, directory=place, limit=MEMORY_LIMIT, **options
    ).run()


def recorded_calls(pipe, model: nn.Module, arguments: dict) -> list[Call]:
    """Runs the pipeline and returns the calls of its denoiser."""
    samples: list[Call] = []

    def record(_: nn.Module, args: tuple, kwargs: dict) -> None:
        values = [copied_to(x, torch.device("cpu")) for x in args]
        named = {key: x.clone() if isinstance(x, Tensor) else x for key, x in kwargs.items()}
        samples.append(Call(tuple(values), named, len(samples)))

    handle = model.register_forward_pre_hook(record, with_kwargs=True)
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


@pytest.mark.parametrize("name", marked(["sdxl"], [name for name in TINY if name != "writes-into-its-input"]))
def test_every_pipeline_gets_the_same_integers(name, tmp_path):
    pipe, arguments = make(name)
    model = next(iter(denoisers(pipe).values()))
    samples = recorded_calls(pipe, model, arguments)
    family = SD3 if name == "sd3" else GENERIC
    settings = Settings(defaults=family.keep_float, groups=family.groups, release=True, **RECIPES["fast"])
    whole = calibrate(copy.deepcopy(model), source_of(samples), settings)
    assert_same(whole, block_by_block(model, samples, settings, tmp_path))
    assert not list(tmp_path.glob("spill-*"))  # spilled values are deleted once no block needs them


OTHERS = {
    "plain": RECIPES["plain"],
    "balanced": RECIPES["balanced"],
    "best": RECIPES["best"],
    "timestep": RECIPES["balanced"] | {"activations": "timestep"},
    "weight-only": {"activations": "float"},
    "mse": {"observer": "mse"},
    "all layers": RECIPES["fast"] | {"defaults": {}},
}


@pytest.mark.parametrize("recipe", marked(["best", "timestep", "mse"], OTHERS))
def test_every_recipe_gets_the_same_integers(recipe, tmp_path):
    pipe, arguments = make("sd3")
    samples = recorded_calls(pipe, pipe.transformer, arguments)
    settings = Settings(**{"defaults": SD3.keep_float, "groups": SD3.groups, "release": True} | OTHERS[recipe])
    whole = calibrate(copy.deepcopy(pipe.transformer), source_of(samples), settings)
    assert_same(whole, block_by_block(pipe.transformer, samples, settings, tmp_path))


@pytest.mark.parametrize("recipe", ["plain", "fast"])
def test_blocks_that_share_factors_have_their_own(recipe, tmp_path):
    pipe = tiny_pipeline()
    model = pipe.transformer
    samples = recorded_calls(pipe, model, {"prompt": "a wave"} | SMALL)
    settings = Settings(defaults=OPENSORA.keep_float, groups=OPENSORA.groups, release=True, **RECIPES[recipe])
    whole = calibrate(copy.deepcopy(model), source_of(samples), settings)
    result = block_by_block(model, samples, settings, tmp_path)
    if recipe == "plain":
        return assert_same(whole, result)
    assert result.warnings == [
        *whole.warnings,
        *(line for line in result.warnings if "3 groups of layers span" in line),
    ]
    assert len(result.warnings) == len(whole.warnings) + 1
    assert result.report["totals"]["output_sqnr"] > whole.report["totals"]["output_sqnr"] - 1


def test_a_limit_below_the_memory_for_rounding_is_refused_before_the_first_call(tmp_path):
    plain, balanced = (Settings(defaults={}, **RECIPES[name]) for name in ("fast", "balanced"))

    def started(settings: Settings, limit: float) -> BlockwiseCalibration:
        return BlockwiseCalibration(toy(width=1024), source_of(calls()), settings, directory=tmp_path, limit=limit)

    sums = 2 * 2048**2 * 8  # bytes: two float64 matrices of `down`, the layer with the most inputs
    limit = resident_memory() + 3 * sums
    started(plain, limit)
    refused(lambda: started(balanced, limit), 7, "to round its widest layer")


def test_the_calibrated_model_computes_with_the_integers(tmp_path):
    model, before = toy(), toy()
    result = block_by_block(model, calls(), Settings(defaults={}), tmp_path)
    assert set(result.layers) >= {"patch", "blocks.0.up", "proj_out"}  # in and outside of the blocks
    with torch.no_grad(), quantized(before, result.layers):
        for call in calls():
            assert torch.equal(model(*call.args, **call.kwargs), before(*call.args, **call.kwargs))


def resident(files: list[Path]) -> int:
    """Returns how many bytes of the mapped files are in the memory of this process."""
    total, counted = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:  # this line starts a mapping and names its file
            counted = any(line.endswith(str(file)) for file in files)
        elif counted and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_integer_blocks_stay_out_of_memory(tmp_path):
    model = toy(width=1024)
    place = tmp_path / "place"
    place.mkdir()
    result = block_by_block(model, calls(), Settings(observer="minmax", **RECIPES["fast"]), place)
    written = sorted(place.iterdir())
    size = sum(file.stat().st_size for file in written)
    assert size > 8 << 20
    little = size / 4  # bytes that may be resident: reading a page also loads pages next to it
    assert resident(written) < little
    assert not any(has_bias_correction(layer) for layer in result.layers.values())  # an export checks this first
    assert resident(written) < little
    export(result, model, tmp_path / "out")
    assert resident(written) < little


class InPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x.add_(super().forward(x))


class Appending(Block):
    def forward(self, x: Tensor, tensors: list[Tensor] | None = None) -> Tensor:
        output = super().forward(x)
        if tensors is not None:
            tensors.append(output)
        return output


class Keeping(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.last = super().forward(x)
        return self.last


class Stage(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers, self.proj = nn.ModuleList([Block(width), Block(width)]), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.proj(x)


class Unlisted(nn.Module):
    """A network that belongs to no family: `kind` makes its blocks and `way` runs them."""

    def __init__(self, kind: Callable[[int], nn.Module], way: Callable[[list[nn.Module], Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.others = nn.ModuleList([kind(8), kind(8)]), nn.ModuleList([kind(8)])
        self.out, self.way = nn.Linear(8, 4), way

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.way([*self.blocks, *self.others], x))


def in_a_row(blocks: list[nn.Module], x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


def with_residual(blocks: list[nn.Module], x: Tensor) -> Tensor:
    return x + in_a_row(blocks, x)


def with_list(blocks: list[nn.Module], x: Tensor) -> Tensor:
    tensors: list[Tensor] = []
    in_a_row([lambda x, block=block: block(x, tensors) for block in blocks], x)
    return torch.stack(tensors).sum(0)


def by_parts(blocks: list[nn.Module], x: Tensor) -> Tensor:
    return in_a_row([lambda x, block=block: x + block.down(torch.relu(block.up(x))) for block in blocks], x)


def weighing(blocks: list[nn.Module], x: Tensor) -> Tensor:
    return in_a_row(blocks, x) * blocks[0].up.weight.mean()


def shared(width: int) -> nn.Module:
    """Returns a block whose linear `up` is shared by all such blocks."""
    block = Block(width)
    block.up = _SHARED
    return block


_SHARED = nn.Linear(8, 16)
_MORE = "the blocks pass on more than their outputs"
UNLISTED = {
    "a row": (Block, in_a_row, ""),
    "in another order": (Block, lambda blocks, x: in_a_row(blocks[::-1], x), ""),
    "one is left out": (Block, lambda blocks, x: in_a_row(blocks[1:], x), ""),
    "nested": (Stage, in_a_row, ""),
    "residual": (Block, with_residual, ""),
    "changed in place": (InPlace, lambda blocks, x: in_a_row(blocks, x * 1), ""),
    "weight read outside": (Block, weighing, ""),
    "changed in place, and used": (InPlace, with_residual, _MORE),
    "a list is filled": (Appending, with_list, _MORE),
    "attribute": (Keeping, lambda blocks, x: in_a_row(blocks, x) + blocks[0].last, _MORE),
    "by parts": (Block, by_parts, "without calling the block. Calibrate"),
    "shared layer": (shared, in_a_row, "several blocks share layer blocks.0.up"),
}


@pytest.mark.parametrize("name", UNLISTED)
def test_networks_of_no_family_get_the_same_integers_or_a_reason(name, tmp_path):
    kind, way, reason = UNLISTED[name]
    calls = [Call((x,), {}) for x in torch.randn(4, 3, 5, 8, generator=torch.Generator().manual_seed(1))]
    settings = Settings(sqnr_calls=4, **RECIPES["fast"])

    def make() -> nn.Module:
        return Unlisted(kind, way).eval().requires_grad_(False)

    if reason:
        message = refused(
            lambda: block_by_block(make(), calls, settings, tmp_path), 2 if "layer" in reason else 4, reason
        )
        assert "without --memory" in message
        return
    whole, by_block = calibrate(make(), source_of(calls), settings), block_by_block(make(), calls, settings, tmp_path)
    assert whole.plan == by_block.plan
    assert whole.layers.keys() == by_block.layers.keys()
    for layer, integer_layer in whole.layers.items():
        state = by_block.layers[layer].state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in integer_layer.state_dict().items()), layer
    assert whole.report["totals"] == by_block.report["totals"]
