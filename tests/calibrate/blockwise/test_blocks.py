"""`Blocks` replays a model block by block, with the same outputs as the whole model and with few values on disk."""

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
    """A model with `count` blocks; `way` runs the blocks and returns the output of the model."""

    def __init__(self, count: int, way: Callable[["Chain", Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(8) for _ in range(count)])
        self.way = way

    def forward(self, x: Tensor, skip: tuple[int, ...] | None = None) -> Tensor:
        self.skip = skip or ()
        return self.way(self, x)


def in_a_row(model: Chain, x: Tensor) -> Tensor:
    for index, block in enumerate(model.blocks):
        if index not in model.skip:
            x = block(x).transpose(0, 1) * 1.5  # computed between two blocks
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
    names = [f"blocks.{index}" for index in range(len(model.blocks))]
    return Blocks(model.eval(), names, Parking(place, torch.device("cpu")), Spill(place))


def passed_on(model: Chain, calls: list[Call], place: Path) -> list[Tensor]:
    blocks = blocks_of(model, place)
    blocks.rehearse(calls)
    track = blocks.sweep(lambda: calls)
    with blocks.ended(lambda: calls, track):
        return [output[0] for output in outputs(model, blocks.calls())]


@pytest.mark.parametrize("way", [in_a_row, backwards, with_a_long_way, twice_each])
def test_the_output_is_that_of_the_whole_model(way, tmp_path):
    model, calls = Chain(5, way), samples()
    exact = [output[0] for output in outputs(model, calls)]
    assert all(map(torch.equal, exact, passed_on(model, calls, tmp_path)))
    assert [type(block) for block in model.blocks] == [Block] * 5
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("first", "others"), [(None, (2,)), ((2,), None), ((0,), (3, 4)), ((1, 2), (2, 3))])
def test_calls_may_leave_out_blocks(first, others, tmp_path):
    model = Chain(5, in_a_row)
    calls = [Call(call.args, {"skip": first if position == 0 else others}) for position, call in enumerate(samples())]
    exact = [output[0] for output in outputs(model, calls)]
    assert all(map(torch.equal, exact, passed_on(model, calls, tmp_path)))


def by_value(model: Chain, x: Tensor) -> Tensor:
    """A model whose control flow depends on its input: it skips the second block if the first is above 0."""
    hidden = model.blocks[0](x)
    return model.blocks[2](hidden if float(x.flatten()[0]) > 0 else model.blocks[1](hidden))


def test_control_flow_that_depends_on_values_is_refused(tmp_path):
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
def test_values_that_no_later_block_needs_are_deleted_from_disk(way, most, tmp_path):
    model = Chain(8, way)
    blocks = blocks_of(model, tmp_path)
    blocks.rehearse(samples())
    file_counts = []

    def visit(name: str) -> None:
        for position, call in enumerate(blocks.calls()):
            run(model, call, position)
        file_counts.append((name, len(list(tmp_path.iterdir()))))

    blocks.sweep(samples, visit)
    assert [name for name, _ in file_counts] == [f"blocks.{index}" for index in range(8)]
    assert max(count for _, count in file_counts) == most


def test_a_visit_sees_one_real_block_and_the_whole_call(tmp_path):
    model = Chain(3, in_a_row)
    blocks = blocks_of(model, tmp_path)
    blocks.rehearse(samples())
    inputs: dict[str, list[Tensor]] = {}

    def visit(name: str) -> None:
        block = model.get_submodule(name)
        assert [type(child) for child in model.blocks].count(Block) == 1
        handle = block.register_forward_pre_hook(lambda _, args: inputs.setdefault(name, []).append(args[0]))
        for position, call in enumerate(blocks.calls()):
            if position != 1:  # a visit may skip calls, which the next block receives all the same
                run(model, call, position)
        handle.remove()

    blocks.sweep(samples, visit)
    exact: dict[str, list[Tensor]] = {}
    for name in inputs:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: exact.setdefault(name, []).append(args[0])
        )
    outputs(model, [samples()[0], samples()[2]])
    assert inputs.keys() == exact.keys()
    for name, tensors in inputs.items():
        assert all(map(torch.equal, tensors, exact[name]))
        assert [x.stride() for x in tensors] == [x.stride() for x in exact[name]]
