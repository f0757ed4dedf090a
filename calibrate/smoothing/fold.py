"""Folds the smoothing factors of a layer into whatever produces its input: a linear, a norm, a modulation.

A smoothed layer multiplies the channels of its input by `mul_scale`, and its weight is divided by the same numbers. The
multiplication can move to the source of the input's channels: into the weight scales and biases of integer layers,
whose codes stay the same, or into float parameters. The model then computes the same up to the rounding of these
scales, biases and parameters, with fewer operations, and a program that does not know mul_scale can run it. Except with
--memory, the SQNR is measured after folding, so it applies to the layers that the checkpoint holds.
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
from ..layers.scheme import Scheme
from ..layers.transforms import Transform, without_multiplier
from ..layers.weights import QuantizedWeight

_MAX_ROUNDING = 0.51  # largest rounding error of quant_bias, in accumulator steps; larger differences are corrections


class Fold(Protocol):
    """Names one source of the input of smoothed layers: `target`, a layer, norm or parameter of the model. The source
    takes the layers' smoothing factors from its position `start` on: factor i is folded into output `start` + i of a
    layer or norm, or into number `start` + i of the flattened parameter.

    `plus_one`: True if the source gives the scale of a modulation, which is applied as 1 + scale.
    """

    @property
    def target(self) -> str: ...

    @property
    def start(self) -> int: ...

    @property
    def plus_one(self) -> bool: ...


class FoldGroup(Protocol):
    """A smoothing group: layers whose inputs are divided by the same smoothing factors, because they share an input or
    because their inputs come from the same sources.

    `folds` are the only sources of these inputs, and the outputs of these sources reach no other layers. If `folds` is
    empty, the factors of these layers cannot be folded.
    """

    @property
    def layers(self) -> Sequence[str]: ...

    @property
    def folds(self) -> Sequence[Fold]: ...


class Unfolded(NamedTuple):
    """A smoothing group whose factors cannot be folded. `layers` are the names of its layers. `folds` is empty, because
    no source of their input can take the factors."""

    layers: tuple[str, ...]
    folds: tuple[Fold, ...] = ()


class FoldResult(NamedTuple):
    """The model after folding: `layers` is a dict from name to integer layer, `parameters` a dict from the name of a
    float parameter to a function that computes its new value.

    A value is computed when its function is called, so the values of a large model need not be in memory together.
    `model.load_state_dict(result.values(), strict=False)` loads all values of the FoldResult `result`.
    """

    layers: dict[str, QuantizedLayer]
    parameters: dict[str, Callable[[], Tensor]]

    def values(self) -> dict[str, Tensor]:
        """Returns the new value of each changed float parameter, as a dict from parameter name to tensor."""
        return {name: make() for name, make in self.parameters.items()}


def fold(model: nn.Module, layers: Mapping[str, QuantizedLayer], groups: Iterable[FoldGroup]) -> FoldResult:
    """Folds the smoothing factors of each group of layers into the sources of the layers' input, and removes mul_scale
    from these layers. Layers of groups that do not allow this stay unchanged.

    A group allows folding if all its layers are integer layers with the same mul_scale and every source of their input
    can be multiplied. `model` is the float model, or has `layers` installed. Neither `model` nor `layers` are changed;
    the result contains unchanged layers as the same objects.
    """
    result = FoldResult(dict(layers), {})
    for group in groups:
        multiplier = _common_multiplier([result.layers.get(name) for name in group.layers])
        if multiplier is None or not group.folds:
            continue
        attempt = FoldResult(dict(result.layers), dict(result.parameters))
        if all(_multiply_source(model, attempt, fold, multiplier) for fold in group.folds):
            for name in group.layers:
                numbers = attempt.layers[name].numbers
                transform = without_multiplier(numbers.transform)
                attempt.layers[name] = _layer_with(attempt.layers[name], replace(numbers, transform=transform))
            result = attempt
    return result


def can_fold(model: nn.Module, group: FoldGroup) -> bool:
    """Returns whether every source of the input of `group`'s layers can be multiplied by smoothing factors."""
    return bool(group.folds) and all(_targets(model, fold) for fold in group.folds)


def with_multipliers(
    model: nn.Module, transforms: Mapping[str, Transform | None], groups: Iterable[FoldGroup]
) -> list[str]:
    """Returns the names of the integer layers that still multiply their input at run time after `fold` has folded the
    smoothing factors of `groups`, the smoothing groups, where it can. `transforms` is a dict from the name of each
    integer layer to the transform of its input."""
    tensors = {name: {} if transform is None else transform.tensors for name, transform in transforms.items()}
    left = {name: each["mul_scale"] for name, each in tensors.items() if "mul_scale" in each}
    for group in groups:
        if can_fold(model, group) and _common([left.get(name) for name in group.layers]) is not None:
            left = {name: multiplier for name, multiplier in left.items() if name not in group.layers}
    return list(left)


@contextmanager
def temporary_values(model: nn.Module, parameters: Mapping[str, Callable[[], Tensor]]) -> Iterator[None]:
    """Gives float parameters of `model` new values inside the `with` statement, then restores the former values, also
    after an exception. `parameters` is a dict from parameter name to a function that computes the new value."""
    before = {name: model.get_parameter(name).data for name in parameters}
    try:
        for name, make in parameters.items():
            model.get_parameter(name).data = make()
        yield
    finally:
        for name, value in before.items():
            model.get_parameter(name).data = value


def _common_multiplier(members: Sequence[QuantizedLayer | None]) -> Tensor | None:
    """Returns the mul_scale of the layers `members` if it is the same for all; None if a layer has another mul_scale or
    no mul_scale, or if a member is None, which stands for a layer that stays float."""
    return _common([None if member is None else member.mul_scale for member in members])


def _common(multipliers: Sequence[Tensor | None]) -> Tensor | None:
    """Returns the multiplier that all of `multipliers` are equal to, or None if there is no such multiplier."""
    existing = [multiplier for multiplier in multipliers if multiplier is not None]
    equal = len(existing) == len(multipliers) > 0 and all(
        torch.equal(multiplier, existing[0]) for multiplier in existing
    )
    return existing[0] if equal else None


def _layer_with(layer: QuantizedLayer, numbers: Numbers) -> QuantizedLayer:
    copy = QuantizedConv2d(numbers, layer.geometry) if isinstance(layer, QuantizedConv2d) else QuantizedLinear(numbers)
    copy.noise_level = layer.noise_level
    return copy


def _multiply_source(model: nn.Module, result: FoldResult, fold: Fold, multiplier: Tensor) -> bool:
    """Multiplies the output of the layer, norm or parameter `fold.target`, from its channel `fold.start` on, by
    `multiplier` (channels,). Changes only `result`: an integer layer in `result.layers`, or the new values of float
    parameters in `result.parameters`. Returns False, with nothing changed, if this output cannot be multiplied."""
    layer = result.layers.get(fold.target)
    if layer is None:
        return _multiply_parameters(model, result.parameters, fold, multiplier)
    factors = torch.ones(len(layer.weight), dtype=torch.float64, device=layer.weight.device)
    factors[fold.start : fold.start + len(multiplier)] = multiplier.to(factors.device, torch.float64)
    if fold.plus_one and layer.bias is None:
        return False
    numbers = multiply_output(layer, factors, factors - 1 if fold.plus_one else torch.zeros_like(factors))
    if isinstance(numbers, str):
        return False
    result.layers[fold.target] = _layer_with(layer, numbers)
    return True


def multiply_output(layer: QuantizedLayer, factors: Tensor, plus: Tensor) -> Numbers | str:
    """Returns the `Numbers` (weight, scales, bias and so on) of a layer that computes y * factors + plus, where y is
    the output of `layer`, with the same codes. `factors` and `plus` are (out,) float64. Returns a text with the reason
    if such a layer cannot be made."""
    numbers = layer.numbers
    if reason := fixed_scales(numbers.input.scheme):
        return reason
    scale = (numbers.weight_scale.to(torch.float64) * factors).to(torch.float32)
    bias = None
    if numbers.bias is not None:
        bias = (numbers.bias.to(torch.float64) * factors + plus).to(numbers.bias.dtype)
    correction = None
    if numbers.quant_bias is not None:  # the exact offset, where the bias is rounded
        correction = output_offset(numbers) * factors + plus - (0.0 if bias is None else bias.to(torch.float64))
    quantized = QuantizedWeight(numbers.weight, scale)
    result = numbers_of(quantized, bias, numbers.input, numbers.dtype, numbers.transform, correction)
    return result if isinstance(result, str) else replace(result, made_bias=numbers.made_bias)


def fixed_scales(scheme: Scheme) -> str | None:
    """Returns the reason why the output channels of a weight cannot each be multiplied by a factor through their scales
    alone; None if they can. `scheme` is the rule for the codes of the layer's input."""
    if scheme.block is not None:
        return "its scales are powers of two"
    return "its output channels share a scale" if scheme.per_tensor else None


def output_offset(numbers: Numbers) -> Tensor:
    """Returns the offset, float64 (out,), that a static layer adds to the product of weight and input for each output
    channel. `numbers` holds the layer's weight, biases and scales.

    The offset of a channel is its float bias, unless quant_bias, converted from an integer to its value, differs from
    the float bias by more than rounding. Then quant_bias holds a bias correction, and the offset is the value of
    quant_bias.
    """
    assert numbers.deq is not None
    assert numbers.quant_bias is not None
    deq = numbers.deq.to(torch.float64).view(-1, len(numbers.weight))  # (bins, out)
    sums = numbers.weight.flatten(1).sum(1, dtype=torch.int64)
    page_out(numbers.weight)
    offset = numbers.input.tensors["input_zero_point"].to(torch.int64).view(-1, 1) * sums
    values = (numbers.quant_bias.view(deq.shape) + offset) * deq
    finest = deq.argmin(0, keepdim=True)  # the bin with the smallest rounding error
    value = values.gather(0, finest)[0]
    bias = torch.zeros_like(value) if numbers.bias is None else numbers.bias.to(torch.float64)
    return torch.where((value - bias).abs() <= _MAX_ROUNDING * deq.gather(0, finest)[0], bias, value)


def _multiply_parameters(
    model: nn.Module, parameters: dict[str, Callable[[], Tensor]], fold: Fold, multiplier: Tensor
) -> bool:
    """Multiplies the output of `fold.target`, a float layer, norm or parameter, from its channel `fold.start` on, by
    `multiplier` (channels,): puts functions that compute the new values of its parameters into the dict `parameters`.
    Returns False if this output cannot be multiplied."""
    targets = _targets(model, fold)
    for name, value, plus_one in targets:
        before = parameters.get(name, partial(_copy, value.detach()))
        parameters[name] = partial(_multiplied_rows, before, fold.start, multiplier, plus_one, flat=name == fold.target)
    return bool(targets)


def _targets(model: nn.Module, fold: Fold) -> list[tuple[str, Tensor, bool]]:
    """Returns the parameters that have to change when the output of `fold.target` is multiplied, as a list of (name,
    value, plus_one). With plus_one, 1 + value has to be multiplied, otherwise value. The list is empty if the source
    cannot be multiplied."""
    parent, _, leaf = fold.target.rpartition(".")
    source = getattr(model.get_submodule(parent), leaf)
    if isinstance(source, nn.Parameter):
        return [(fold.target, source, fold.plus_one)]
    weight, bias = getattr(source, "weight", None), getattr(source, "bias", None)
    if bias is None and (weight is None or fold.plus_one):
        return []
    both = [(f"{fold.target}.weight", weight, False), (f"{fold.target}.bias", bias, fold.plus_one)]
    return [(name, value, plus_one) for name, value, plus_one in both if value is not None]


def _copy(value: Tensor) -> Tensor:
    # an original that is mapped from a file leaves resident memory
    copy = value.clone(memory_format=torch.contiguous_format)
    page_out(value)
    return copy


def _multiplied_rows(
    make: Callable[[], Tensor], start: int, multiplier: Tensor, plus_one: bool, *, flat: bool
) -> Tensor:
    """Returns the tensor that `make` computes, with row `start` + i multiplied by number i of `multiplier`, for every
    i. With `flat`, numbers of the flattened tensor are multiplied instead of rows. With `plus_one`, 1 + value is
    multiplied and 1 subtracted again."""
    tensor = make()
    part = (tensor.view(-1) if flat else tensor)[start : start + len(multiplier)]
    factors = multiplier.to(part.device, torch.float64).view([-1] + [1] * (part.ndim - 1))
    part.copy_((1 + part.to(torch.float64)) * factors - 1 if plus_one else part.to(torch.float64) * factors)
    return tensor
