"""Folds the smoothing factor of a layer into whatever produces its input: a linear, a norm, a modulation.

The weight of a layer with mul_scale already carries the inverse. So the multiplier may move to where the input's
channels come from: into the weight scales and biases of integer layers, whose int8 codes stay, or into float
parameters. The model then computes the same, up to the rounding of these numbers, with fewer operations, also in a
consumer that knows no multiplier. A model is folded before it is measured, so that the written numbers are measured.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from octavo.capture.paging import page_out

from ..layers.freeze import numbers_of
from ..layers.modules import QuantizedConv2d, QuantizedLayer, QuantizedLinear
from ..layers.numbers import Numbers
from ..layers.weights import QuantizedWeight

_HALF = 0.51  # largest rounding of quant_bias, in steps of the accumulator: a larger difference is a correction


class Fold(Protocol):
    """The source of the channels of an input: rows from `start` of a layer, a norm, or a flattened parameter.

    `plus_one`: the source gives the scale of a modulation, which is applied as 1 + scale.
    """

    @property
    def target(self) -> str: ...

    @property
    def start(self) -> int: ...

    @property
    def plus_one(self) -> bool: ...


class FoldGroup(Protocol):
    """Layers that receive the same input, or inputs whose channels are to be divided by the same factors. The inputs
    come from `folds` alone, whose outputs reach these layers alone; without `folds` nothing can be folded."""

    @property
    def layers(self) -> Sequence[str]: ...

    @property
    def folds(self) -> Sequence[Fold]: ...


class Folded(NamedTuple):
    """The integer layers, and functions that make new values for float parameters of the model, by name.

    A value is made when asked for, so that the values of a large model need not be in memory together;
    `model.load_state_dict(values(), strict=False)` loads all.
    """

    layers: dict[str, QuantizedLayer]
    parameters: dict[str, Callable[[], Tensor]]

    def values(self) -> dict[str, Tensor]:
        """All new values by name."""
        return {name: make() for name, make in self.parameters.items()}


def fold(model: nn.Module, layers: Mapping[str, QuantizedLayer], groups: Iterable[FoldGroup]) -> Folded:
    """Folds mul_scale away in each group that allows it; the other layers stay as they were.

    A group allows it where all its layers are integer layers with the same mul_scale and every source of their input
    takes the multiplication. `model` is the float model, or has `layers` installed; neither `model` nor `layers` are
    changed, and layers that stay the same are the same objects.
    """
    made = Folded(dict(layers), {})
    for group in groups:
        multiplier = _common([made.layers.get(name) for name in group.layers])
        if multiplier is None or not group.folds:
            continue
        tried = Folded(dict(made.layers), dict(made.parameters))
        if all(_moved(model, tried, fold, multiplier) for fold in group.folds):
            for name in group.layers:
                tried.layers[name] = _with(tried.layers[name], replace(tried.layers[name].numbers, transform=None))
            made = tried
    return made


@contextmanager
def valued(model: nn.Module, parameters: Mapping[str, Callable[[], Tensor]]) -> Iterator[None]:
    """Inside, the float parameters of `model` have the values that `parameters` make; afterwards, whatever happens,
    those of before."""
    before = {name: model.get_parameter(name).data for name in parameters}
    try:
        for name, make in parameters.items():
            model.get_parameter(name).data = make()
        yield
    finally:
        for name, value in before.items():
            model.get_parameter(name).data = value


def _common(members: Sequence[QuantizedLayer | None]) -> Tensor | None:
    """The multiplier that all members have; None where one has none or another."""
    found = [None if member is None else member.mul_scale for member in members]
    known = [each for each in found if each is not None]
    same = len(known) == len(found) > 0 and all(torch.equal(each, known[0]) for each in known)
    return known[0] if same else None


def _with(layer: QuantizedLayer, numbers: Numbers) -> QuantizedLayer:
    """A layer of the same kind with other numbers."""
    made = QuantizedConv2d(numbers, layer.geometry) if isinstance(layer, QuantizedConv2d) else QuantizedLinear(numbers)
    made.noise_level = layer.noise_level
    return made


def _moved(model: nn.Module, made: Folded, fold: Fold, multiplier: Tensor) -> bool:
    """Multiplies the source that `fold` names; False where the source cannot take the multiplication."""
    layer = made.layers.get(fold.target)
    if layer is None:
        return _float(model, made.parameters, fold, multiplier)
    by = torch.ones(len(layer.weight), dtype=torch.float64, device=layer.weight.device)
    by[fold.start : fold.start + len(multiplier)] = multiplier.to(by.device, torch.float64)
    if fold.plus_one and layer.bias is None:
        return False
    numbers = multiplied(layer, by, by - 1 if fold.plus_one else torch.zeros_like(by))
    if isinstance(numbers, str):
        return False
    made.layers[fold.target] = _with(layer, numbers)
    return True


def multiplied(layer: QuantizedLayer, by: Tensor, plus: Tensor) -> Numbers | str:
    """The numbers of a layer with the same int8 codes and the output of `layer` times `by` plus `plus`, both (out,)
    float64; or the reason why there are none.
    """
    numbers = layer.numbers
    scale = (numbers.weight_scale.to(torch.float64) * by).to(torch.float32)
    bias = None
    if numbers.bias is not None:
        bias = (numbers.bias.to(torch.float64) * by + plus).to(numbers.bias.dtype)
    correction = None
    if layer.calibrated:  # the exact sum, in place of the rounded bias
        correction = added(numbers) * by + plus - (0.0 if bias is None else bias.to(torch.float64))
    quantized = QuantizedWeight(numbers.weight, scale)
    made = numbers_of(quantized, bias, numbers.input, numbers.dtype, numbers.transform, correction)
    return made if isinstance(made, str) else replace(made, made_bias=numbers.made_bias)


def added(numbers: Numbers) -> Tensor:
    """The offset that a layer with ranges adds to its output, float64 (out,): the bias, or, with a correction, the
    value of quant_bias."""
    assert numbers.deq is not None
    assert numbers.quant_bias is not None
    deq = numbers.deq.to(torch.float64).view(-1, len(numbers.weight))  # (bins, out)
    sums = numbers.weight.flatten(1).sum(1, dtype=torch.int64)
    page_out(numbers.weight)
    offset = numbers.input.tensors["input_zero_point"].to(torch.int64).view(-1, 1) * sums
    carried = (numbers.quant_bias.view(deq.shape) + offset) * deq
    finest = deq.argmin(0, keepdim=True)  # the bin with the smallest rounding error
    added = carried.gather(0, finest)[0]
    bias = torch.zeros_like(added) if numbers.bias is None else numbers.bias.to(torch.float64)
    return torch.where((added - bias).abs() <= _HALF * deq.gather(0, finest)[0], bias, added)


def _float(model: nn.Module, parameters: dict[str, Callable[[], Tensor]], fold: Fold, multiplier: Tensor) -> bool:
    """Multiplies float parameters: those in `parameters`, or copies of the model's."""
    parent, _, leaf = fold.target.rpartition(".")
    found = getattr(model.get_submodule(parent), leaf)
    weight, bias = getattr(found, "weight", None), getattr(found, "bias", None)
    targets: list[tuple[str, Tensor | None, bool]]
    if isinstance(found, nn.Parameter):
        targets = [(fold.target, found, fold.plus_one)]
    elif bias is None and (weight is None or fold.plus_one):
        return False
    else:
        targets = [(f"{fold.target}.weight", weight, False), (f"{fold.target}.bias", bias, fold.plus_one)]
    for name, value, plus_one in targets:
        if value is None:
            continue
        before = parameters.get(name, partial(_copied, value.detach()))
        parameters[name] = partial(_scaled, before, fold.start, multiplier, plus_one, flat=name == fold.target)
    return True


def _copied(value: Tensor) -> Tensor:
    copy = value.clone(memory_format=torch.contiguous_format)
    page_out(value)
    return copy


def _scaled(make: Callable[[], Tensor], start: int, multiplier: Tensor, plus_one: bool, *, flat: bool) -> Tensor:
    """The tensor that `make` gives, with the rows from `start` multiplied; with `flat`, the numbers of the flattened
    tensor."""
    made = make()
    part = (made.view(-1) if flat else made)[start : start + len(multiplier)]
    by = multiplier.to(part.device, torch.float64).view([-1] + [1] * (part.ndim - 1))
    part.copy_((1 + part.to(torch.float64)) * by - 1 if plus_one else part.to(torch.float64) * by)
    return made
