"""Defines Family, which holds the names that ComfyUI gives to the tensors of a model.

A rule maps names in diffusers to a native name, the one in the files of the model's authors, which ComfyUI reads. The
key of a rule is the native name, its value the name in diffusers, or a tuple of names whose rows are concatenated. A
rule renames a tensor of exactly that name and all tensors below it: "time_in" also stands for "time_in.weight". Of
several rules for a name, the one with the longest name in diffusers counts. `{}` stands for the number of a block.
"""

from collections.abc import Mapping
from typing import NamedTuple

Rules = Mapping[str, str | tuple[str, ...]]


class Family(NamedTuple):
    """The native names of one model class.

    | field        | meaning                                                                                       |
    |--------------|-----------------------------------------------------------------------------------------------|
    | title        | name of the models, for messages                                                              |
    | rules        | dict from native name to the names in diffusers                                               |
    | native       | a tensor that every file with native names has                                                |
    | diffusers    | a tensor that every file with diffusers' names has, and none with native names                |
    | swapped      | native names of layers whose first and second half of rows are exchanged                      |
    | swapped_last | the same, for the last block only                                                             |
    | flat         | native names of tensors whose axes are joined into one                                        |
    | only         | dict from a key of the model's config to the only value for which there are native names      |
    | flags        | dict from a key of the model's config to the name of the empty tensor that stands for it      |
    """

    title: str
    rules: Rules
    native: str
    diffusers: str | None = None
    swapped: frozenset[str] = frozenset()
    swapped_last: frozenset[str] = frozenset()
    flat: frozenset[str] = frozenset()
    only: Mapping[str, tuple[int, ...]] = {}
    flags: Mapping[str, str] = {}


def below(native: str, diffusers: str, rules: Rules) -> dict[str, str | tuple[str, ...]]:
    """Returns `rules` with the prefix `native` before their native names and `diffusers` before the others."""

    def prefixed(names: str | tuple[str, ...]) -> str | tuple[str, ...]:
        return f"{diffusers}{names}" if isinstance(names, str) else tuple(f"{diffusers}{name}" for name in names)

    return {f"{native}{name}": prefixed(names) for name, names in rules.items()}


def same(*names: str) -> dict[str, str]:
    """Returns rules for names that are the same in diffusers."""
    return {name: name for name in names}
