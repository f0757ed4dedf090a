"""Puts integer layers into a model, permanently or inside a `with` statement."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from .modules import IntegerLayer, QuantizedLayer
from .noise_level import attach

M = TypeVar("M", bound=nn.Module)


def names_of(model: nn.Module) -> dict[str, list[str]]:
    """Returns a dict with an entry for each module in `model`. The key is the first name of the module in the order of
    `named_modules`, and the value is the list of all its names. A module that is used in several places has several
    names."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return {aliases[0]: aliases for aliases in names.values()}


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` into `model` under `name`. A module that is used in several places is replaced only under this
    name.

    nn.TransformerEncoderLayer has a fast path, which reads the weights of its layers instead of running them, and would
    take an integer weight for a float one. It does not take the fast path if one of its layers has a hook, so an
    integer layer inside it gets a forward pre-hook that does nothing. The normal path does not accept nested tensors.
    So each nn.TransformerEncoder around the layer gets use_nested_tensor = False, and no longer makes nested tensors
    from padded batches.
    """
    parent, _, child = name.rpartition(".")
    above = model.get_submodule(parent)
    if isinstance(above, nn.TransformerEncoderLayer) and isinstance(module, IntegerLayer):
        module.register_forward_pre_hook(_no_effect)
        for encoder in _encoders(model, name):
            encoder.use_nested_tensor = False
    setattr(above, child, module)


def _encoders(model: nn.Module, name: str) -> list[nn.TransformerEncoder]:
    parts = name.split(".")
    parents = [model.get_submodule(".".join(parts[:end])) for end in range(len(parts))]
    return [module for module in parents if isinstance(module, nn.TransformerEncoder)]


def _no_effect(module: nn.Module, args: Any) -> None:
    """Forward pre-hook that does nothing."""


@contextmanager
def swapped(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Puts `modules`, a dict from name to module, into `model` inside the `with` statement, and restores the former
    modules afterwards, also after an exception."""
    before = {name: model.get_submodule(name) for name in modules}
    nested = {encoder: encoder.use_nested_tensor for name in modules for encoder in _encoders(model, name)}
    try:
        for name, module in modules.items():
            replace(model, name, module)
        yield
    finally:
        for name, module in before.items():
            replace(model, name, module)
        for encoder, use in nested.items():
            encoder.use_nested_tensor = use


def install(model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> Callable[[], None]:
    """Replaces layers of `model` by the integer `layers`, a dict from layer name to layer, and keeps no reference to
    the float layers.

    If the ranges of an integer layer depend on the noise level, hooks record the noise level of each call of `model`.
    Returns a function that removes these hooks.
    """
    by_name = all_names(layers, model)
    detach = _share_noise_level(model, layers)
    for name, layer in by_name.items():
        replace(model, name, layer)
    return detach


def _share_noise_level(model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> Callable[[], None]:
    """Attaches hooks to `model` that record the noise level of each call, if the ranges of one of the integer `layers`
    depend on it. Returns a function that removes the hooks."""
    if not any(layer.input_type.by_level for layer in layers.values()):
        return _detach_nothing
    noise, detach = attach(model)
    for layer in layers.values():
        layer.noise_level = noise
    return detach


def _detach_nothing() -> None:
    """Does nothing, in place of a function that removes hooks."""


@contextmanager
def quantized(model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> Iterator[nn.Module]:
    """Makes `model` compute with the integer `layers`, a dict from layer name to layer, inside the `with` statement,
    and yields `model`. Restores the float layers afterwards, also after an exception."""
    levels = {name: layer.noise_level for name, layer in layers.items()}
    with swapped(model, all_names(layers, model)):
        detach = _share_noise_level(model, layers)
        try:
            yield model
        finally:
            detach()
            for name, layer in layers.items():
                layer.noise_level = levels[name]


def all_names(layers: Mapping[str, M], model: nn.Module) -> dict[str, M]:
    """Returns `layers`, a dict from name to layer, with more entries for layers that are used in several places
    of `model`. Such a layer has several names, but `layers` only has the first of them; the result has all."""
    names = names_of(model)
    return {name: layer for first, layer in layers.items() for name in names[first]}
