"""The record of a family of models: defaults, layers that stay float, groups of layers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Fold(NamedTuple):
    """The source of the channels of an input: rows from `start` of a Linear or a norm, or of a flattened parameter.

    `plus_one`: the source gives the scale of a modulation, which is applied as 1 + scale.
    """

    target: str
    start: int = 0
    plus_one: bool = False


class Group(NamedTuple):
    """Layers whose inputs come from `folds` alone, where the outputs of `folds` reach these layers alone."""

    layers: tuple[str, ...]
    folds: tuple[Fold, ...]


@dataclass(frozen=True)
class Family:
    """The record of one family; for anything not given here the pipeline's own default holds."""

    name: str
    pipelines: tuple[str, ...] = ()  # prefixes of the pipeline class names
    models: tuple[str, ...] = ()  # names of the model in config.json of a folder of the denoiser alone
    defaults: Mapping[str, Any] = field(default_factory=dict)  # arguments of the pipeline's call
    keep_float: Mapping[str, str] | None = None  # pattern of layer names -> why; None: the general rule
    more_float: Mapping[str, str] = field(default_factory=dict)  # beside the general rule, where keep_float is None
    # (directory, dtype or None, folder of the text encoder or None) -> pipeline; None: diffusers loads it
    load: Callable[[Any, Any, Any], Any] | None = None
    groups: Callable[[Any], list[Group]] | None = None  # denoiser -> layers whose input channels can be divided
