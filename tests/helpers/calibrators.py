"""Calibrators of the toy network, and a check that two of them chose the same integers."""

from typing import Any

import torch
from torch import nn

from octavo.calibrate.msmodelslim_api import Calibrator, QuantConfig

from ..zoo.toy import calls

LABEL_FREE: dict[str, Any] = {"act_method": 1, "quant_mode": 1}


def data() -> list[dict[str, Any]]:
    """Returns samples of the toy network."""
    return [{"x": call.args[0], **call.kwargs} for call in calls(4)]


def calibrated(model: nn.Module, samples: list[dict[str, Any]] | None = None, **config: Any) -> Calibrator:
    """Returns a calibrator of `model` after its run on the samples, by default those of the toy network."""
    calibrator = Calibrator(model, QuantConfig(**(LABEL_FREE | config)), data() if samples is None else samples)
    calibrator.run()
    return calibrator


def same(one: Calibrator, other: Calibrator) -> None:
    """Checks that two calibrators have the same names and numbers."""
    for first, second in zip(one.get_quant_params(), other.get_quant_params(), strict=True):
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
