"""What Octavo knows about a family of models."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Fold(NamedTuple):
    """What makes the channels of an input: rows from `start` of a Linear or a norm, or of a parameter seen flat.

    `plus_one`: it makes the scale of a modulation, which is applied as 1 + scale.
    """

    target: str
    start: int = 0
    plus_one: bool = False


class Group(NamedTuple):
    """Layers whose inputs are made by `folds` and by nothing else, and reach nothing but these layers."""

    layers: tuple[str, ...]
    folds: tuple[Fold, ...]


@dataclass(frozen=True)
class Family:
    """Defaults of one family; everything a family does not say is the pipeline's own default."""

    name: str
    pipelines: tuple[str, ...] = ()  # prefixes of the pipeline class names
    models: tuple[str, ...] = ()  # what config.json of a folder of the denoiser alone calls it
    defaults: Mapping[str, Any] = field(default_factory=dict)  # arguments of the pipeline's call
    keep_float: Mapping[str, str] | None = None  # pattern of layer names -> why; None: the general rule
    more_float: Mapping[str, str] = field(default_factory=dict)  # beside the general rule, where keep_float is None
    # (directory, dtype or None, folder of the text encoder or None) -> pipeline; None: diffusers loads it
    load: Callable[[Any, Any, Any], Any] | None = None
    groups: Callable[[Any], list[Group]] | None = None  # denoiser -> layers whose input channels can be divided
