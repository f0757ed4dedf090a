"""Defines what Octavo knows of a family of models: defaults, layers that stay float, groups of layers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Fold(NamedTuple):
    """The rows that produce a layer's input: those from `start` on of `target`, a Linear, a norm or a flat parameter.

    Dividing these rows divides the channels of the input. With `plus_one` the rows produce the scale of a modulation,
    which the model applies as 1 + scale.
    """

    target: str
    start: int = 0
    plus_one: bool = False


class Group(NamedTuple):
    """Layers that get their input only from `folds`, whose outputs reach only these layers."""

    layers: tuple[str, ...]
    folds: tuple[Fold, ...]


@dataclass(frozen=True)
class Family:
    """The defaults of one family. Where a field is empty, the pipeline's own default holds."""

    name: str
    pipelines: tuple[str, ...] = ()  # prefixes of the pipeline class names
    models: tuple[str, ...] = ()  # class or type in the config.json of a folder that holds only the denoiser
    defaults: Mapping[str, Any] = field(default_factory=dict)  # arguments of the pipeline's call
    keep_float: Mapping[str, str] | None = (
        None  # pattern of layer names -> reason; None: the general rule of calibrate/plan.py
    )
    more_float: Mapping[str, str] = field(
        default_factory=dict
    )  # patterns in addition to the general rule; only where keep_float is None
    # (directory, dtype or None, folder of the text encoder or None) -> pipeline; None: diffusers loads it
    load: Callable[[Any, Any, Any], Any] | None = None
    groups: Callable[[Any], list[Group]] | None = None  # denoiser -> layers whose input channels can be divided
