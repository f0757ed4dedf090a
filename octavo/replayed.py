"""The calls of a capture that a calibration replays."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from calibrate.samples import farthest
from calibrate.survey import held_out
from capture.reader import Capture

from .terminal import Terminal


class Replayed(NamedTuple):
    """A stored call; `unit`: the prompt it is of, None where there are too few to hold one out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    unit: int | None
    step: int | None
    timestep: float | None


def chosen_calls(capture: Capture, component: str, samples: int | None, terminal: Terminal) -> set[int]:
    """The places of the calls to replay among all of a component: those that differ most, where not all."""
    count = sum(header.component == component for unit in capture.units for header in unit.calls)
    if samples is None or samples >= count:
        return set(range(count))
    stored = replayed_calls(capture, component, set(range(count)), lambda value: value)()
    return set(farthest(terminal.progress("choose", stored, count), samples))


def replayed_calls(
    capture: Capture, component: str, chosen: set[int], cast: Callable[[Any], Any]
) -> Callable[[], Iterator[Replayed]]:
    """The calls of a component at the places `chosen` among all of its calls; each time anew."""
    split = any(held_out(unit.index) for unit in capture.units)

    def calls() -> Iterator[Replayed]:
        at = -1

        def wanted(header: Any) -> bool:
            nonlocal at
            at += header.component == component
            return header.component == component and at in chosen

        for unit in capture.units:
            for call in capture.calls(component, units=(unit.index,), where=wanted):
                number = unit.index if split else None
                yield Replayed(cast(call.args), cast(call.kwargs), number, call.step, call.timestep)

    return calls
