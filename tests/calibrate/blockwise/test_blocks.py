"""Blocks that run one after the other, given what the ones before returned."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from octavo.calibrate.blockwise.blocks import Blocks
from octavo.calibrate.blockwise.parking import Parking
from octavo.calibrate.blockwise.spill import Spill
from octavo.calibrate.replay.calls import run
from octavo.calibrate.replay.sqnr import outputs

from ...helpers.refusals import refused
from ...zoo.toy import Block, Call


class Chain(nn.Module):
    """Blocks in a row; how they are run is given."""

    def __init__(self, count: int, way: Callable[["Chain", Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(8) for _ in range(count)])
        self.way = way

    def forward(self, x: Tensor, skip: tuple[int, ...] | None = None) -> Tensor:
        self.skip = skip or ()
        return self.way(self, x)


def in_a_row(model: Chain, x: Tensor) -> Tensor:
    for at, block in enumerate(model.blocks):
        if at not in model.skip:
            x = block(x).transpose(0, 1) * 1.5  # what lies between blocks
    return x


def backwards(model: Chain, x: Tensor) -> Tensor:
    for block in reversed(model.blocks):
        x = block(x)
    return x


def with_a_long_way(model: Chain, x: Tensor) -> Tensor:
    first = x = model.blocks[0](x)
    for block in model.blocks[1:-1]:
        x = block(x)
    return model.blocks[-1](x + first)


def twice_each(model: Chain, x: Tensor) -> Tensor:
    for block in model.blocks:
        x = block(block(x))
    return x


def all_twice(model: Chain, x: Tensor) -> Tensor:
    return in_a_row(model, in_a_row(model, x))


def samples(count: int = 3) -> list[Call]:
    torch.manual_seed(1)
    return [Call((torch.randn(4, 4, 8),), {}) for _ in range(count)]


def blocks_of(model: Chain, place: Path) -> Blocks:
    names = [f"blocks.{at}" for at in range(len(model.blocks))]
    return Blocks(model.eval(), names, Parking(place, torch.device("cpu")), Spill(place))


def passed_on(model: Chain, calls: list[Call], place: Path) -> list[Tensor]:
    blocks = blocks_of(model, place)
    blocks.rehearse(calls)
    track = blocks.sweep(lambda: calls)
    with blocks.ended(lambda: calls, track):
        return [made[0] for made in outputs(model, blocks.calls())]


@pytest.mark.parametrize("way", [in_a_row, backwards, with_a_long_way, twice_each])
def test_the_output_is_that_of_the_whole_model(way, tmp_path):
    model, calls = Chain(5, way), samples()
    exact = [made[0] for made in outputs(model, calls)]
    assert all(map(torch.equal, exact, passed_on(model, calls, tmp_path)))
    assert [type(block) for block in model.blocks] == [Block] * 5
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("first", "others"), [(None, (2,)), ((2,), None), ((0,), (3, 4)), ((1, 2), (2, 3))])
def test_calls_may_leave_out_blocks(first, others, tmp_path):
    model = Chain(5, in_a_row)
    calls = [Call(call.args, {"skip": first if at == 0 else others}) for at, call in enumerate(samples())]
    exact = [made[0] for made in outputs(model, calls)]
    assert all(map(torch.equal, exact, passed_on(model, calls, tmp_path)))


def by_value(model: Chain, x: Tensor) -> Tensor:
    """A model whose control flow depends on its input: it skips the second block if the first is above 0."""
    made = model.blocks[0](x)
    return model.blocks[2](made if float(x.flatten()[0]) > 0 else model.blocks[1](made))


def test_ways_that_no_argument_tells_are_refused(tmp_path):
    calls = [Call((torch.full((4, 4, 8), sign),), {}) for sign in (-1.0, 1.0)]
    refused(
        lambda: passed_on(Chain(3, by_value), calls, tmp_path),
        4,
        re.compile(r"blocks.2.*than in the first call.*without --memory"),
    )


def test_blocks_that_run_again_after_others_are_refused(tmp_path):
    refused(
        lambda: passed_on(Chain(3, all_twice), samples(), tmp_path),
        4,
        re.compile(r"runs again after other blocks.*without --memory"),
    )


@pytest.mark.parametrize(("way", "most"), [(in_a_row, 2), (with_a_long_way, 3)])
def test_what_no_block_needs_any_more_leaves_the_disk(way, most, tmp_path):
    model = Chain(8, way)
    blocks = blocks_of(model, tmp_path)
    blocks.rehearse(samples())
    seen = []

    def visit(name: str) -> None:
        for at, call in enumerate(blocks.calls()):
            run(model, call, at)
        seen.append((name, len(list(tmp_path.iterdir()))))

    blocks.sweep(samples, visit)
    assert [name for name, _ in seen] == [f"blocks.{at}" for at in range(8)]
    assert max(count for _, count in seen) == most


def test_a_visit_sees_one_real_block_and_the_whole_call(tmp_path):
    model = Chain(3, in_a_row)
    blocks = blocks_of(model, tmp_path)
    blocks.rehearse(samples())
    heard: dict[str, list[Tensor]] = {}

    def visit(name: str) -> None:
        block = model.get_submodule(name)
        assert [type(each) for each in model.blocks].count(Block) == 1
        handle = block.register_forward_pre_hook(lambda _, args: heard.setdefault(name, []).append(args[0]))
        for at, call in enumerate(blocks.calls()):
            if at != 1:  # a visit may leave out calls: they are passed on all the same
                run(model, call, at)
        handle.remove()

    blocks.sweep(samples, visit)
    exact: dict[str, list[Tensor]] = {}
    for name in heard:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: exact.setdefault(name, []).append(args[0])
        )
    outputs(model, [samples()[0], samples()[2]])
    assert heard.keys() == exact.keys()
    for name, tensors in heard.items():
        assert all(map(torch.equal, tensors, exact[name]))
        assert [x.stride() for x in tensors] == [x.stride() for x in exact[name]]
