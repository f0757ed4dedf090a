"""The result of a calibration."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .layers.modules import QuantizedLayer
from .plan import Plan
from .replay.calls import Call


@dataclass(frozen=True)
class Result:
    """What a calibration made: the plan as it came out, the integer layers by name, report.json's content, what the
    denoiser was called with, step by step, where that was asked for, a call of the model, and how many axes the inputs
    of its layers have."""

    plan: Plan
    layers: dict[str, QuantizedLayer]
    report: dict[str, Any]
    timesteps: tuple[float, ...] | None = None
    example: Call | None = None
    axes: Mapping[str, int] = field(default_factory=dict)

    @property
    def warnings(self) -> list[str]:
        """What the user should know, one line each."""
        return list(self.report["warnings"])
