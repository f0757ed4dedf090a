"""Puts integer layers into a model, for good or for the time of a `with` block."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from .modules import QuantizedLayer
from .noise_level import attach


def names_of(model: nn.Module) -> dict[str, list[str]]:
    """The first name of each module, and all its names: a module that two others share has several."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return {each[0]: each for each in names.values()}


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` where `name` is, once."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def install(model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> Callable[[], None]:
    """Replaces the layers of `model`; the float ones are let go. Where ranges of one of them depend on the noise
    level, hooks observe that of each call of `model`: what is returned takes them off again."""
    names, detach = names_of(model), _nothing
    if any(layer.input_type.by_level for layer in layers.values()):
        noise, detach = attach(model)
        for layer in layers.values():
            layer.noise_level = noise
    for first, layer in layers.items():
        for name in names[first]:
            replace(model, name, layer)
    return detach


def _nothing() -> None:
    """Takes off no hook."""


@contextmanager
def quantized(model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> Iterator[nn.Module]:
    """Inside, `model` computes with the integer layers; afterwards, whatever happens, it is what it was."""
    names = names_of(model)
    before = {name: model.get_submodule(name) for first in layers for name in names[first]}
    levels = {name: layer.noise_level for name, layer in layers.items()}
    detach = install(model, layers)
    try:
        yield model
    finally:
        detach()
        for name, module in before.items():
            replace(model, name, module)
        for name, layer in layers.items():
            layer.noise_level = levels[name]


def all_names(layers: Mapping[str, QuantizedLayer], model: nn.Module) -> dict[str, QuantizedLayer]:
    """The layers by every name that `model` has for them."""
    names = names_of(model)
    return {name: layer for first, layer in layers.items() for name in names[first]}
