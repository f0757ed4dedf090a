"""The result of a calibration."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .attention.measure import AttentionRow
from .layers.modules import QuantizedLayer
from .plan import Plan
from .replay.calls import Call


@dataclass(frozen=True)
class Result:
    """The result of a calibration.

    | field      | meaning                                                                                          |
    |------------|--------------------------------------------------------------------------------------------------|
    | plan       | the final plan: which layers became integers, and why the others stay float                      |
    | layers     | dict from layer name to integer layer                                                            |
    | report     | the content of report.json                                                                       |
    | timesteps  | the noise levels of the calls, descending; None where ranges do not depend on them               |
    | example    | a call of the model, from which a graph can be exported; None where no call was kept             |
    | axes       | dict from layer name to the number of axes of the layer's input, 0 where calls differ            |
    | parameters | float parameters that smoothing factors were folded into: dict from the name of a parameter to a |
    |            | function that returns its new value                                                              |
    | attention  | the measured error of each attention module with each type of quantized attention; the type of   |
    |            | each module is chosen from these errors. Empty if attention stays float                          |
    """

    plan: Plan
    layers: dict[str, QuantizedLayer]
    report: dict[str, Any]
    timesteps: tuple[float, ...] | None = None
    example: Call | None = None
    axes: Mapping[str, int] = field(default_factory=dict)
    parameters: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)
    attention: Sequence[AttentionRow] = ()

    @property
    def warnings(self) -> list[str]:
        """The warnings for the user, one line each."""
        return list(self.report["warnings"])
