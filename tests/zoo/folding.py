"""Divides the channels of a layer's input without an operation: whatever produces the input is divided instead.

    y = W x = (W * s) (x / s)            x / s is had by dividing rows of the weights and biases that make x

A norm that is modulated, n * (1 + scale) + shift, is divided through both of its factors: (1 + scale) / s and shift / s
are again of that form, with the modulation's rows divided, and for the bias of scale (1 + bias) / s - 1.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from octavo.pipelines.family import Fold, Group


class Slice(NamedTuple):
    """A part of a parameter whose first axis is channels: `values` is a view; `plus_one`: 1 + values is divided."""

    values: Tensor
    plus_one: bool


def slices(model: nn.Module, fold: Fold, channels: int) -> Iterator[Slice]:
    """Yields the parts of parameters that a fold divides, as views of (channels, ...)."""
    rows = slice(fold.start, fold.start + channels)
    parent, _, leaf = fold.target.rpartition(".")
    target = getattr(model.get_submodule(parent), leaf)
    if isinstance(target, nn.Parameter):
        yield Slice(target.detach().reshape(-1)[rows], fold.plus_one)
        return
    if isinstance(target, nn.Linear) or target.weight is not None:
        yield Slice(target.weight.detach()[rows], False)
    if target.bias is not None:
        yield Slice(target.bias.detach()[rows], fold.plus_one)


def fold(model: nn.Module, groups: Sequence[tuple[Group, Tensor]]) -> None:
    """Divides the inputs of each group's layers by its factors (channels,), and multiplies their weights by them.

    What the model computes stays the same up to rounding, and so does the number of its operations.
    """
    with torch.no_grad():
        for group, factors in groups:
            for target in group.folds:
                for values, plus_one in slices(model, target, len(factors)):
                    divide(values, factors, plus_one)
            for name in group.layers:
                weight = model.get_parameter(f"{name}.weight")
                weight.copy_(weight * factors.to(torch.float64))


def divide(values: Tensor, factors: Tensor, plus_one: bool) -> None:
    """Computes values / factors in place, or (1 + values) / factors - 1; in float64."""
    by = factors.to(torch.float64).view([-1] + [1] * (values.ndim - 1))
    wide = values.to(torch.float64)
    values.copy_((1 + wide) / by - 1 if plus_one else wide / by)
