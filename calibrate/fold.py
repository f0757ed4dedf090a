"""Calibration of a model whose batch norms are folded first."""

from dataclasses import replace

from torch import nn

from .batchnorm import folded, has_norms
from .calls import Calls, Progress, silent
from .run import Result, calibrate
from .sensitivity import Trajectory
from .settings import DEFAULTS, Settings


def calibrate_folded(
    model: nn.Module,
    calls: Calls,
    settings: Settings = DEFAULTS,
    *,
    progress: Progress = silent,
    trajectory: Trajectory | None = None,
    changing: bool = False,
) -> tuple[Result, nn.Module]:
    """As `run.calibrate`, and the model that the layers belong to: `model`, or a copy of it where batch norms were
    folded; with `changing` that is `model` too. The report lists the pairs under `folded`; the result
    has the first call.

    Raises what `run.calibrate` does.
    """
    pairs, call = [], next(iter(calls()), None)
    if call is not None and has_norms(model):
        model, found = folded(model, call, changing=changing)
        pairs = [pair._asdict() for pair in found]
    result = calibrate(model, calls, settings, progress=progress, trajectory=trajectory)
    return replace(result, report=result.report | {"folded": pairs}, example=call), model
