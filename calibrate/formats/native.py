"""Defines NativeModel, which says how the model class of a runtime (a program that runs models, such as SGLang) differs
from the class in diffusers: which layers may be integer layers, and what the layers are called. Importing this module
needs no torch."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class NativeModel:
    """The layers of one model class in a runtime, a program that runs models, such as SGLang.

    | field   | meaning                                                                                             |
    |---------|-----------------------------------------------------------------------------------------------------|
    | integer | patterns with * that match the diffusers names of the layers that may be integer layers             |
    | renamed | (regular expression, replacement) pairs, from the diffusers name of a layer to the runtime's name;  |
    |         | only the first that matches is applied. Layers that get the same name are one layer in the runtime  |
    """

    integer: tuple[str, ...]
    renamed: tuple[tuple[str, str], ...] = ()

    def name(self, layer: str) -> str:
        """Returns the runtime's name of the layer that diffusers calls `layer`."""
        for pattern, replacement in self.renamed:
            changed, count = re.subn(pattern, replacement, layer)
            if count:
                return changed
        return layer

    def holds(self, layer: str) -> bool:
        """Returns whether the runtime can load the layer that diffusers calls `layer` as an integer layer."""
        return any(fnmatchcase(layer, pattern) for pattern in self.integer)

    def joined(self, layers: Iterable[str]) -> dict[str, list[str]]:
        """Returns a dict from the runtime's name of a layer to the diffusers names of the layers that the runtime joins
        to it, such as query, key and value. A layer that is not joined has a list of one name. `layers` are the
        diffusers names of all linear layers; layers that the runtime can only hold as float are left out."""
        groups: dict[str, list[str]] = defaultdict(list)
        for layer in layers:
            if self.holds(layer):
                groups[self.name(layer)].append(layer)
        return dict(groups)

    def written(self, integers: Collection[str], layers: Iterable[str]) -> set[str]:
        """Returns the names of the layers that become integer layers in the runtime. `integers` are the names of the
        layers that were quantized, and `layers` the names of all linear layers of the model, both as diffusers has
        them. A layer of `integers` is left out if the runtime can hold it only as float, or if the runtime joins it
        with a float layer."""
        return {
            name for group in self.joined(layers).values() if all(member in integers for member in group)
            for name in group
        }  # fmt: skip


def linears_in(model: "nn.Module") -> list[str]:
    """Returns the names of all linear layers of `model`, float or integer. A layer that is used in several places is
    listed under each of its names."""
    from torch import nn

    from ..layers.modules import QuantizedLinear

    modules = model.named_modules(remove_duplicate=False)
    return [name for name, module in modules if isinstance(module, (nn.Linear, QuantizedLinear))]


def not_linear(model: "nn.Module", names: Collection[str], scheme: str = "") -> set[str]:
    """Returns those of `names`, names of layers of `model`, that belong to convolutions and not to linear layers, in
    whatever `scheme`."""
    return set(names) - set(linears_in(model))


def patterns(prefix: str, leaves: Sequence[str]) -> tuple[str, ...]:
    """Returns the patterns "prefix.leaf" for all `leaves`."""
    return tuple(f"{prefix}.{leaf}" for leaf in leaves)


def reason_against(model: str, known: Mapping[str, NativeModel], unthreaded: Mapping[str, str], runtime: str) -> str:
    """Returns the reason why `runtime` cannot load integer layers of the model class `model`, and what the user can do;
    "" if it can load them.

    The keys of `known` are the names of the model classes whose integer layers `runtime` can load. `unthreaded` is a
    dict from the name of another model class to the reason why it cannot. For a class that is in neither dict, the
    reason is that Octavo does not know its layers.
    """
    if model in known:
        return ""
    fact = unthreaded.get(model, f"Octavo has no list of the layers that {runtime} can hold in integers for {model}")
    return f"{fact}. Use --format diffusers, or one of the models {', '.join(sorted(known))}."
