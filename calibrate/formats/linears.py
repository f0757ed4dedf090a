"""Collects the tensors of a model with integer layers, for libraries that name the tensors of an integer layer in their
own way. All integer layers are linear layers."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

from torch import Tensor, nn

from octavo.capture.errors import UsageError
from octavo.capture.paging import page_out
from octavo.capture.tensors import Planned

from ..layers.install import all_names
from ..layers.modules import QuantizedLayer, QuantizedLinear
from ..layers.scheme import in_float32
from ..layers.weights import check_finite_tensor, decoded, spread
from .diffusers.write import state

Parts = Callable[[str, QuantizedLayer], Iterable[tuple[str, Planned]]]


def linear_tensors(
    layers: Mapping[str, QuantizedLayer],
    model: nn.Module,
    parameters: Mapping[str, Callable[[], Tensor]],
    parts: Parts,
) -> dict[str, Planned]:
    """Returns a dict from name to tensor with the tensors of `model`. The tensors of the integer `layers` are those
    that `parts` yields.

    `parts` is called with the name of an integer layer and the layer. It yields (last part of the tensor's name,
    tensor), such as ("weight_scale", ...). `parameters` are the float parameters with smoothing factors folded in, a
    dict from name to a function that returns the new value. Raises NumbersError for a number that is not finite.
    """
    tensors: dict[str, Planned] = {}
    named = all_names(layers, model)
    for name, tensor in state(model, {}, parameters):
        owner, _, leaf = name.rpartition(".")
        if owner not in named:
            tensors[name] = tensor
        elif leaf == "weight":
            tensors |= {f"{owner}.{key}": value for key, value in parts(owner, named[owner])}
    for name, layer in named.items():
        check_finite_tensor(f"{name}.weight_scale", layer.weight_scale)
        if layer.bias is not None:
            check_finite_tensor(f"{name}.bias", layer.bias)
    return tensors


def check_linears(
    name_of_format: str, layers: Mapping[str, QuantizedLayer], schemes: Iterable[str], remedy: str
) -> None:
    """Raises UsageError for a convolution, for a layer whose scheme is not one of `schemes`, and for a layer that has a
    bias only for its bias correction. Messages name the format `name_of_format`. The message about a scheme ends with
    `remedy`, which says what the user can do."""
    for name, layer in layers.items():
        fact = ""
        if not isinstance(layer, QuantizedLinear):
            fact = "is a convolution, which the format cannot hold. Keep the layer float."
        elif layer.scheme not in schemes:
            fact = f"has the scheme {layer.scheme}, which the format cannot hold. {remedy}"
        elif layer.made_bias:
            fact = "has no bias in the float model to add the bias correction to. Use --no-bias-correction."
        if fact:
            raise UsageError(f"format {name_of_format}: {name} {fact}")


def float_parts(layer: QuantizedLayer) -> Iterator[tuple[str, Planned]]:
    """Yields ("weight", tensor) and, if the layer has a bias, ("bias", tensor), both in the layer's float dtype. The
    weight is codes times scale. Used for layers that software can only hold as float."""
    yield "weight", Planned(layer.dtype, tuple(layer.weight.shape), partial(dequantized, layer))
    if layer.bias is not None:
        yield "bias", Planned.of(layer.bias)


def dequantized(layer: QuantizedLayer) -> Tensor:
    """Returns the weight of an 8-bit layer in the layer's float dtype: codes times scale, with the layer's rotation
    undone."""
    weight = in_float32(layer.weight.detach())
    weight *= spread(decoded(layer.weight_scale), weight)
    page_out(layer.weight)
    transform = layer.transform
    return (weight if transform is None else transform.weight(weight)).to(layer.dtype)  # a rotation is its own inverse
