"""Defines how a runtime's own model differs from the model of diffusers: which of its layers can hold integers, and how
it calls them. Importing this module needs no torch."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class NativeModel:
    """The layers of one model class in a runtime.

    | field   | meaning                                                                                             |
    |---------|-----------------------------------------------------------------------------------------------------|
    | integer | patterns of the diffusers names of the layers that the runtime can hold in integers                 |
    | renamed | pairs of a regular expression and a replacement; the first that matches a diffusers name of a layer |
    |         | gives the runtime's name of it. Layers that get the same name are one layer in the runtime          |
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
        """Returns whether the runtime can hold the layer that diffusers calls `layer` in integers."""
        return any(fnmatchcase(layer, pattern) for pattern in self.integer)

    def joined(self, layers: Iterable[str]) -> dict[str, list[str]]:
        """Returns a dict from the runtime's name of a layer to the names in diffusers of the layers that it consists
        of. `layers` are all linear layers, by their names in diffusers; layers that the runtime keeps float are left
        out."""
        groups: dict[str, list[str]] = defaultdict(list)
        for layer in layers:
            if self.holds(layer):
                groups[self.name(layer)].append(layer)
        return dict(groups)

    def written(self, integers: Collection[str], layers: Iterable[str]) -> set[str]:
        """Returns those of the layers `integers` that can be integers in the runtime: the runtime can hold them, and
        all layers that it joins with them are integers too. `layers` are all linear layers of the model."""
        return {
            name for group in self.joined(layers).values() if all(member in integers for member in group)
            for name in group
        }  # fmt: skip


def patterns(prefix: str, leaves: Sequence[str]) -> tuple[str, ...]:
    """Returns the patterns "prefix.leaf" for all `leaves`."""
    return tuple(f"{prefix}.{leaf}" for leaf in leaves)


def reason_against(model: str, known: Mapping[str, NativeModel], unthreaded: Mapping[str, str], runtime: str) -> str:
    """Returns why `runtime` cannot load integers for the model class `model`, with advice; "" if it can.

    `known` has the model classes whose layers are known; `unthreaded` has a reason for others.
    """
    if model in known:
        return ""
    fact = unthreaded.get(model, f"Octavo has no list of the layers that {runtime} can hold in integers for {model}")
    return f"{fact}. Use --format diffusers, or one of the models {', '.join(sorted(known))}."
