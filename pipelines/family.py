"""Defines what Octavo knows of a family of models: defaults, layers that stay float, smoothing groups."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Fold(NamedTuple):
    """Names what produces the input of a layer, so that smoothing factors can be folded into it.

    These are the rows from `start` on of `target`, a Linear, a norm or a flat parameter: dividing a row by a factor
    divides one channel of the input. With `plus_one` the rows produce the scale of a modulation, which the model
    applies as 1 + scale.
    """

    target: str
    start: int = 0
    plus_one: bool = False


class Group(NamedTuple):
    """A smoothing group: `layers` share an input, which only `folds` produce and no other layer reads.

    The smoothing factors of the group can therefore be folded into the rows that `folds` name.
    """

    layers: tuple[str, ...]
    folds: tuple[Fold, ...]


@dataclass(frozen=True)
class Family:
    """Octavo's defaults for one kind of pipeline. Where a field is empty, the pipeline's own default holds."""

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
    groups: Callable[[Any], list[Group]] | None = None  # denoiser -> its smoothing groups
