"""Puts integer layers into a model, for good or for the time of a `with` block."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from .modules import IntegerLayer, QuantizedLayer
from .noise_level import attach


def names_of(model: nn.Module) -> dict[str, list[str]]:
    """The first name of each module, and all its names: a module that two others share has several."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return {each[0]: each for each in names.values()}


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` where `name` is, once. nn.TransformerEncoderLayer runs an integer layer, rather than reading its
    weight as a float one, only where something has a hook; and it then takes no nested tensors, which
    nn.TransformerEncoder would make of padded ones."""
    parent, _, child = name.rpartition(".")
    above = model.get_submodule(parent)
    if isinstance(above, nn.TransformerEncoderLayer) and isinstance(module, IntegerLayer):
        module.register_forward_pre_hook(_unchanged)
        for encoder in _encoders(model, name):
            encoder.use_nested_tensor = False
    setattr(above, child, module)


def _encoders(model: nn.Module, name: str) -> list[nn.TransformerEncoder]:
    """The encoders of torch that the module `name` is in."""
    parts = name.split(".")
    around = [model.get_submodule(".".join(parts[:end])) for end in range(len(parts))]
    return [module for module in around if isinstance(module, nn.TransformerEncoder)]


def _unchanged(module: nn.Module, args: Any) -> None:
    """A hook that does nothing."""


@contextmanager
def swapped(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, `modules` stand in `model` under their names; afterwards, whatever happens, the modules of before do."""
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
    """Replaces the layers of `model`; the float ones are let go. Where ranges of one of them depend on the noise level,
    hooks observe that of each call of `model`: the function returned takes the hooks off again."""
    places = all_names(layers, model)
    detach = _share_noise_level(model, layers)
    for name, layer in places.items():
        replace(model, name, layer)
    return detach


def _share_noise_level(model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> Callable[[], None]:
    """Lets the layers know the noise level of each call of `model`, where one of them needs it."""
    if not any(layer.input_type.by_level for layer in layers.values()):
        return _nothing
    noise, detach = attach(model)
    for layer in layers.values():
        layer.noise_level = noise
    return detach


def _nothing() -> None:
    """Takes off no hook."""


@contextmanager
def quantized(model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> Iterator[nn.Module]:
    """Inside, `model` computes with the integer layers; afterwards, whatever happens, it is what it was."""
    levels = {name: layer.noise_level for name, layer in layers.items()}
    with swapped(model, all_names(layers, model)):
        detach = _share_noise_level(model, layers)
        try:
            yield model
        finally:
            detach()
            for name, layer in layers.items():
                layer.noise_level = levels[name]


def all_names(layers: Mapping[str, QuantizedLayer], model: nn.Module) -> dict[str, QuantizedLayer]:
    """The layers by every name that `model` has for them."""
    names = names_of(model)
    return {name: layer for first, layer in layers.items() for name in names[first]}
