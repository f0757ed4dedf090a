"""Budgets: limits on the bytes and the time of a model's layers, in the form that a user writes.

| text      | limit                                                                                            |
|-----------|--------------------------------------------------------------------------------------------------|
| 5MiB      | bytes of all layers in the plan together. Units: B, KB, MB, GB, KiB, MiB, GiB                    |
| 40%       | the same bytes, as a share of the bytes that these layers have as float layers                   |
| 0.7x      | estimated time of these layers, as a share of their estimated time as float layers. The time of  |
|           | a layer is its number of multiply-accumulates times a factor for its scheme (the table TIME)     |
| 40%,0.7x  | both limits                                                                                      |
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from octavo.capture.errors import UsageError

from ..byte_sizes import SIZE_FORM, UNITS
from ..layers.inputs import DynamicInput, FloatInput, Input, StaticInput, TimestepInput

# time of a multiply-accumulate, relative to one in half precision; an estimate, not a measurement. int8 units have
# twice the peak of float16 units (NVIDIA A100 Tensor Core GPU Architecture, 2020: 624 TOPS to 312 TFLOPS; Ascend 910,
# HC31, 2019: 512 to 256), and the peak limits large layers. W8A16 multiplies in half precision. The added tenth for a
# dynamic scale, which needs one more pass over the input, is an assumption.
TIME: Mapping[type[Input], float] = {FloatInput: 1.0, DynamicInput: 0.55, StaticInput: 0.5, TimestepInput: 0.5}
_REMEDY = "Write 5MiB, 40% (of the bytes as floats), 0.7x (of the time as floats), or 40%,0.7x"


class Cost(NamedTuple):
    """Holds the cost of layers. `bytes`: the size of their tensors. `time`: how long the layers compute in one run of
    the pipeline, an estimate in units of one multiply-accumulate in half precision."""

    bytes: float = 0.0
    time: float = 0.0

    def plus(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.time + other.time)

    def minus(self, other: "Cost") -> "Cost":
        return Cost(self.bytes - other.bytes, self.time - other.time)

    def within(self, limit: "Cost") -> bool:
        """Returns whether bytes and time are at most those of `limit`, up to float rounding (1e-9)."""
        return all(own <= most * (1 + 1e-9) + 1e-9 for own, most in zip(self, limit, strict=True))


@dataclass(frozen=True)
class Budget:
    """Limits the size and the time of layers; `text` is what the user wrote. The size is limited to `bytes` bytes, or
    to the fraction `share` of the bytes of the float layers. The estimated time is limited to the fraction `time` of
    the time that the float layers take. None means no limit."""

    text: str
    bytes: float | None = None
    share: float | None = None
    time: float | None = None

    def limit(self, before: Cost) -> Cost:
        """Returns the most bytes and the most time that the layers may take within this budget; infinite where there is
        no limit. `before` is the cost of the layers when all are float; the shares in the budget are shares of this
        cost."""
        most = self.bytes if self.share is None else self.share * before.bytes
        time = float("inf") if self.time is None else self.time * before.time
        return Cost(float("inf") if most is None else most, time)


@dataclass(frozen=True)
class Search:
    """Holds the schemes to choose from, and the number of pipeline runs that the search may use.

    `schemes`: the names of the schemes; a layer may also stay float. Empty: those of `Settings.mixture`. `runs`: the
    most runs, for all schemes together, for measuring the error that each layer causes in each scheme. If measuring
    each layer alone would take more runs, layers of a transformer block are measured together as a group: those of one
    submodule, or all of them. `refining`: the most runs for trying exchanges, in which one or two groups change their
    scheme. Exchanges are tried if the measured error of the whole choice is more than 1.5 times the sum of the errors
    that were measured for single groups.
    """

    schemes: tuple[str, ...] = ()
    runs: int = 600
    refining: int = 16


SEARCH = Search()


def budget_of(text: str) -> Budget:
    """Reads a budget from a user's text. Raises UsageError for a part between commas that is not a limit, and for two
    limits of the same kind (size or time)."""
    limits: dict[str, float] = {}
    for part in text.split(","):
        kind, amount = _part(text, part.strip())
        same = {"bytes", "share"} if kind in ("bytes", "share") else {kind}
        if same & set(limits):
            word = "the time" if kind == "time" else "the size"
            raise UsageError(f"budget '{text}': limits {word} twice. Give one limit.")
        limits[kind] = amount
    return Budget(text, **limits)


def _part(text: str, part: str) -> tuple[str, float]:
    match = SIZE_FORM.fullmatch(part)
    if match is None or not match[2]:
        fact = f"'{part}' has no unit" if match else f"'{part}' is not a limit"
        raise UsageError(f"budget '{text}': {fact}. {_REMEDY}.")
    number, unit = float(match[1]), match[2]
    if not number > 0:
        raise UsageError(f"budget '{text}': '{part}' is not above 0. {_REMEDY}.")
    if unit == "%":
        return "share", number / 100
    if unit in ("x", "X"):
        return "time", number
    if unit not in UNITS:
        raise UsageError(f"budget '{text}': '{unit}' is not a unit. Use one of {', '.join(UNITS)}, % or x.")
    return "bytes", number * UNITS[unit]


def summed(costs: Iterable[Cost]) -> Cost:
    """Returns the sum of `costs`: all bytes, and all time."""
    whole = Cost()
    for cost in costs:
        whole = whole.plus(cost)
    return whole
