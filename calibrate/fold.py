"""Calibration of a model whose batch norms are folded first."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from .batchnorm import Folded, folded
from .calls import Calls, Progress, silent
from .casts import cast_to
from .run import Result, calibrate, planned
from .sensitivity import Trajectory
from .settings import DEFAULTS, Settings

logger = logging.getLogger(__name__)


def calibrate_folded(
    model: nn.Module,
    calls: Calls,
    settings: Settings = DEFAULTS,
    *,
    progress: Progress = silent,
    trajectory: Trajectory | None = None,
    changing: bool = False,
    warnings: Sequence[str] = (),
) -> tuple[Result, nn.Module]:
    """As `run.calibrate`, and the model that the layers belong to: `model`, or a copy of it where batch norms were
    folded; with `changing` that is `model` too. The report lists the pairs under `folded`, and its warnings begin with
    `warnings`; the result has the first call.

    Raises what `run.calibrate` and `batchnorm.folded` do.
    """
    found, call = Folded(model, ()), next(iter(calls()), None)
    if call is not None:
        names = planned(model, settings).quantized
        settings = _kept(settings, cast_to(model, call, names))
        if any(isinstance(model.get_submodule(name), nn.Conv2d) for name in names):  # what graphs are made of
            settings = replace(settings, reciprocal=True)
        found = folded(model, call, changing=changing)
        model = found.model
    told = [*warnings, *filter(None, [found.warning])]
    for warning in told:
        logger.warning(warning)
    result = calibrate(model, calls, settings, progress=progress, trajectory=trajectory)
    pairs = [pair._asdict() for pair in found.pairs]
    report = result.report | {"folded": pairs, "warnings": [*told, *result.warnings]}
    return replace(result, report=report, example=call), model


def _kept(settings: Settings, reasons: Mapping[str, str]) -> Settings:
    """The settings by which the layers of `reasons` stay float too."""
    if settings.defaults is None:
        return replace(settings, more_float={**reasons, **settings.more_float})
    return replace(settings, defaults={**reasons, **settings.defaults})
