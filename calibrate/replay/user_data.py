"""Converts a user's calibration data to calls of the model."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from octavo.capture.errors import FileError


class Sample(NamedTuple):
    """A call: the arguments for the model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def sample_of(value: Any, position: int) -> Any:
    """A call from a dict of keyword arguments, a list or tuple of positional arguments, or a single tensor."""
    if hasattr(value, "args") and hasattr(value, "kwargs"):
        return value
    if isinstance(value, Mapping):
        return Sample((), dict(value))
    if isinstance(value, (list, tuple)):
        return Sample(tuple(value), {})
    if isinstance(value, Tensor):
        return Sample((value,), {})
    kind = type(value).__name__
    raise FileError(f"calib_data[{position}]: expected a dict, list or tuple of inputs, found {kind}. Give one.")


def calls_of(data: Iterable[Any] | None) -> Callable[[], Iterable[Any]] | None:
    """A function that gives the calls anew each time; None where there are none. Data that can be iterated again and
    again, as a DataLoader can, are streamed; an iterator is kept as a list.

    Raises FileError for data that are not an iterable of samples.
    """
    if isinstance(data, (Tensor, Mapping, str)) or not (data is None or isinstance(data, Iterable)):
        kind = type(data).__name__
        raise FileError(f"calib_data: expected a list of samples, found {kind}. Put the samples in a list.")
    if data is None or isinstance(data, (Sequence, Iterator)):
        samples = list(_samples(data or ()))
        return (lambda: samples) if samples else None
    return lambda: _samples(data)


def _samples(data: Iterable[Any]) -> Iterator[Any]:
    return (sample_of(value, position) for position, value in enumerate(data))
