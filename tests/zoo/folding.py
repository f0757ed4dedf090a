"""Folds factors into whatever produces the input of a layer, so that dividing the input needs no operation.

    y = W x = (W * s) (x / s)            dividing rows of the weights and biases that produce x gives x / s

The input of a modulated norm, n * (1 + scale) + shift, is divided in both parts: (1 + scale) / s and shift / s have the
same form. The modulation's rows are divided by s, and the bias of scale becomes (1 + bias) / s - 1.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from octavo.pipelines.family import Fold, Group


class Slice(NamedTuple):
    """The part of a parameter that a fold divides, with channels as the first axis.

    `values` is a view of the parameter. With `plus_one`, 1 + values is divided.
    """

    values: Tensor
    plus_one: bool


def slices(model: nn.Module, fold: Fold, channels: int) -> Iterator[Slice]:
    """Yields the parts of parameters that a fold divides, as views of shape (channels, ...)."""
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
    """Divides the inputs of each group's layers by its factors (channels,), and multiplies the layers' weights by them.

    The output of the model stays the same up to rounding, and the number of operations stays the same.
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
    """Replaces values by values / factors or, with `plus_one`, by (1 + values) / factors - 1. Computes in float64."""
    by = factors.to(torch.float64).view([-1] + [1] * (values.ndim - 1))
    wide = values.to(torch.float64)
    values.copy_((1 + wide) / by - 1 if plus_one else wide / by)
