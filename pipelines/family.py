"""Defines a family, Octavo's defaults for one kind of pipeline, and the smoothing groups of its denoiser."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Fold(NamedTuple):
    """Names rows of a weight into which the smoothing factors of a group can be folded.

    The rows begin at number `start` of `target`, a Linear, a norm or a flattened parameter. There are as many rows as
    smoothing factors. Each row produces one channel of the group's input, so dividing the row by the factor of the
    channel divides the channel. With `plus_one` the rows produce a value t that the model applies as 1 + t, the scale
    of a modulation. Then the fold changes t to (1 + t) / factor - 1, so that the 1 is divided too.
    """

    target: str
    start: int = 0
    plus_one: bool = False


class Group(NamedTuple):
    """A smoothing group: layers that share an input, which no other layer reads. `layers` are their names.

    `folds` name the rows of weights that produce the input. The group's smoothing factors can be folded into them.
    """

    layers: tuple[str, ...]
    folds: tuple[Fold, ...]


@dataclass(frozen=True)
class Family:
    """Octavo's defaults for one kind of pipeline.

    pipelines    prefixes of the names of the pipeline classes
    models       class names and model types by which a folder with only the denoiser is known, from its config.json
    defaults     arguments of the pipeline's call
    keep_float   dict from a pattern of layer names to the reason why these layers stay float; all others are quantized.
                 None: layers inside blocks are quantized, except those known to be sensitive to 8 bits
                 (`general_reason` in calibrate/plan.py)
    more_float   dict like `keep_float`, of further layers that stay float; only used if `keep_float` is None
    load         loads the pipeline, given its directory, a dtype and the folder of a text encoder; None: diffusers does
    groups       returns the smoothing groups of a denoiser
    """

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
