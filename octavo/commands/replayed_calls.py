"""Chooses the calls of a capture that a calibration replays, and reads them."""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

from octavo.calibrate.replay.current_call import held_out
from octavo.calibrate.replay.farthest_calls import farthest
from octavo.capture.ranks import Ranks
from octavo.capture.store.reader import Call, Capture

from ..terminal import Terminal


class StoredCall:
    """A call in a capture, which a calibration may replay. Its tensors are read from disk only when `args` or `kwargs`
    is first used, because each process replays only some of the calls.

    The function `load` reads the call, and the function `cast` is applied to the arguments that were read. `step` is
    the denoising step of the call, `timestep` its noise level. `unit` is the number of the call's prompt, from 0. If a
    capture has fewer than four prompts, single calls are held out instead of prompts, so `unit` is None for all calls.
    """

    def __init__(
        self, load: Callable[[], Call], cast: Callable[[Any], Any], unit: int | None, step: Any, timestep: Any
    ) -> None:
        self._load, self._cast = load, cast
        self.unit, self.step, self.timestep = unit, step, timestep

    @cached_property
    def _read(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call = self._load()
        return self._cast(call.args), self._cast(call.kwargs)

    @property
    def args(self) -> tuple[Any, ...]:
        return self._read[0]

    @property
    def kwargs(self) -> dict[str, Any]:
        return self._read[1]


def chosen_calls(capture: Capture, component: str, samples: int | None, terminal: Terminal, ranks: Ranks) -> set[int]:
    """Returns which calls of the denoiser `component` to replay, as indices among all its calls: the `samples` calls
    that differ most from each other. If `samples` is None, or there are no more than `samples` calls, returns the
    indices of all calls. The `ranks` share the work, and `terminal` shows the progress."""
    count = sum(header.component == component for unit in capture.units for header in unit.calls)
    if samples is None or samples >= count:
        return set(range(count))
    stored = replayed_calls(capture, component, set(range(count)), lambda value: value)()
    return set(farthest(terminal.progress("choose", stored, count), samples, ranks))


def replayed_calls(
    capture: Capture, component: str, chosen: set[int], cast: Callable[[Any], Any]
) -> Callable[[], Iterator[StoredCall]]:
    """Returns a function that iterates over the calls to replay. Whenever the function is called, the iteration starts
    from the first of these calls.

    `chosen` are the indices of the calls to replay among all calls of the denoiser `component`. `cast` is applied to
    the arguments of each call.
    """
    split = any(held_out(unit.index) for unit in capture.units)

    def calls() -> Iterator[StoredCall]:
        index = -1

        def wanted(header: Any) -> bool:
            nonlocal index
            index += header.component == component
            return header.component == component and index in chosen

        for unit in capture.units:
            for header, load in capture.later(component, units=(unit.index,), where=wanted):
                yield StoredCall(load, cast, unit.index if split else None, header.step, header.timestep)

    return calls
