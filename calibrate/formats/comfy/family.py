"""Defines Family, a table of the native names of a model's tensors: the names that the model's authors use in their
files, and that ComfyUI reads. It is not the Family of `pipelines.family`, which holds defaults for a pipeline.

A rule maps names in diffusers to a native name. The key of a rule is the native name. Its value is the name in
diffusers, or a tuple of names in diffusers whose tensors are concatenated along the rows, such as "attn.qkv": ("to_q",
"to_k", "to_v"). A rule renames the tensor of exactly that name and all tensors below it: "time_in" also stands for
"time_in.weight". If several rules fit a name, the rule with the longest name in diffusers is used. `{}` stands for the
number of a block.
"""

from collections.abc import Mapping
from typing import NamedTuple

Rules = Mapping[str, str | tuple[str, ...]]


class Family(NamedTuple):
    """A table of the native names of one model class: the names that the model's authors use and ComfyUI reads. It is
    not the Family of `pipelines.family`, which holds defaults for a pipeline.

    | field        | meaning                                                                                       |
    |--------------|-----------------------------------------------------------------------------------------------|
    | title        | name of the model, for messages                                                               |
    | rules        | dict from native name to the name or names in diffusers                                       |
    | native       | native name of a tensor that every file with native names has                                 |
    | diffusers    | name of a tensor that every file with diffusers' names has, and no file with native names;    |
    |              | None if there is no such tensor                                                               |
    | swapped      | native names of layers whose tensors have the first and the second half of their rows in the  |
    |              | opposite order to diffusers                                                                   |
    | swapped_last | native names, with {} for the number of a block, of layers for which this holds in the last   |
    |              | block only                                                                                    |
    | flat         | native names of tensors that are flattened to one axis, unlike in diffusers                   |
    | only         | dict from a key of the model's config to the value, a list of integers, for which the native  |
    |              | names are known; a model with another value is refused                                        |
    | flags        | dict from a key of the model's config to the name of an empty tensor, which a native file     |
    |              | has if the value of the key is true                                                           |
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
    """Returns a copy of `rules` with the prefix `native` before every native name, and the prefix `diffusers` before
    every name in diffusers."""

    def prefixed(names: str | tuple[str, ...]) -> str | tuple[str, ...]:
        return f"{diffusers}{names}" if isinstance(names, str) else tuple(f"{diffusers}{name}" for name in names)

    return {f"{native}{name}": prefixed(names) for name, names in rules.items()}


def same(*names: str) -> dict[str, str]:
    """Returns a dict from each of `names` to itself. It serves as `rules` of a Family, a dict from native name to
    diffusers name, for layers or tensors whose native name is the diffusers name."""
    return {name: name for name in names}
