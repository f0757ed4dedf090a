"""Converts a user's calibration data to calls of the model, the same calls in every pass over the data."""

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from octavo.capture.errors import FileError, MisfitError, OctavoError
from octavo.capture.store.blobs import memory_of

from .calls import copied_to

KEPT = 1 << 30  # bytes of samples kept in memory: about 1700 pictures of 224 x 224. Larger data are read in each pass
_CPU = torch.device("cpu")


class Sample(NamedTuple):
    """A call from the user's data: `args` and `kwargs` are the model's arguments. Messages show `source`, where the
    arguments come from, and `remedy`, what to do if they do not fit the model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    source: str = ""
    remedy: str = ""


def sample_of(value: Any, position: int, model: nn.Module | None = None) -> Any:
    """Makes a call from `value`, a sample of the user's data in one of four forms:

    - a dict of keyword arguments,
    - a list or tuple of positional arguments,
    - a pair (args, kwargs) of a tuple and a dict, with which model.forward(*args, **kwargs) is a valid call,
    - a single tensor or NumPy array.

    NumPy arrays become tensors. A value that already is a call is returned unchanged. `position` is the position in the
    data, for messages. Raises FileError for a value of any other type, for a PIL picture or an array without numbers in
    it, and for a key that is not text.
    """
    source = f"calib_data[{position}]"
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    if hasattr(value, "args") and hasattr(value, "kwargs"):
        return value
    if isinstance(value, Mapping):
        args, kwargs = (), dict(value)
    elif _is_pair(value, model):
        args, kwargs = tuple(value[0]), dict(value[1])
    elif isinstance(value, (list, tuple)):
        args, kwargs = tuple(value), {}
    elif isinstance(value, (Tensor, np.ndarray)):
        args, kwargs = (value,), {}
    else:
        raise FileError(f"{source}: {_foreign(value) or _unknown(value)}")
    for argument in (*args, *kwargs.values()):
        if fault := _foreign(argument):
            raise FileError(f"{source}: {fault}")
    if name := next((name for name in kwargs if not isinstance(name, str)), None):
        raise FileError(f"{source}: the key {name!r} is not text. Give a dict of keyword arguments.")
    inputs = {name: _tensor(argument) for name, argument in kwargs.items()}
    return Sample(tuple(map(_tensor, args)), inputs, source)


def _is_pair(value: Any, model: nn.Module | None) -> bool:
    """Returns whether `value`, a sample, is a pair (args, kwargs) of arguments of `model`, the form that torch.export
    uses."""
    shaped = isinstance(value, (list, tuple)) and [type(part) for part in value] == [tuple, dict]
    if not shaped or model is None:
        return False
    try:
        inspect.signature(model.forward).bind(*value[0], **value[1])
    except TypeError:
        return False
    return True


def _tensor(value: Any) -> Any:
    return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value


def _foreign(value: Any) -> str:
    """Returns the end of a message: why a value cannot be an input of a model, and what to do; "" for a value that
    can."""
    if type(value).__module__.partition(".")[0] == "PIL":
        return "holds a PIL picture. Give the tensor that the model's preprocessing makes of it."
    if isinstance(value, np.ndarray) and value.dtype.kind not in "biufc":
        return f"holds a NumPy array of dtype {value.dtype}. Give arrays of numbers."
    return ""


def _unknown(value: Any) -> str:
    return f"expected a dict, list or tuple of inputs, found {type(value).__name__}. Give one of these."


def calls_of(data: Iterable[Any] | None, model: nn.Module | None = None) -> Callable[[], Iterable[Any]] | None:
    """Returns a function that returns the same calls each time it is called: one for each sample in `data`. Returns
    None if `data` is None or an empty list or iterator.

    The samples of a list or an iterator are kept in memory. Other iterables, such as a DataLoader, are read again in
    each pass if they are too large for memory (`Passes`); a sample that then differs from that of the first pass raises
    MisfitError. Raises FileError for data that are not an iterable of samples.
    """
    whole = isinstance(data, (Tensor, np.ndarray, Mapping, str))
    if whole or not (data is None or isinstance(data, Iterable)):
        remedy = (
            "Give a DataLoader of it" if not whole and hasattr(data, "__getitem__") else "Put the samples in a list"
        )
        raise FileError(f"calib_data: expected a list of samples, found {type(data).__name__}. {remedy}.")
    if data is None or isinstance(data, (list, tuple, Iterator)):
        samples = [sample_of(value, position, model) for position, value in enumerate(data or ())]
        return (lambda: samples) if samples else None
    return Passes(data, model)


class Passes:
    """A function that yields the same samples each time it is called: those of the first pass over `data`, which may
    shuffle or augment.

    Up to `limit` bytes of samples are copied and kept in memory. Larger data are read again in each pass, and each
    sample is compared with its digest from the first pass. As soon as the first pass reaches the limit, the data are
    read from the start again, and the samples read so far are compared. So shuffled or augmented data are refused
    early.
    """

    def __init__(self, data: Iterable[Any], model: nn.Module | None = None, limit: int = KEPT) -> None:
        self._data, self._model, self._limit = data, model, limit
        self._kept: list[Any] | None = []  # the samples in memory; None: the samples are too large
        self._source: Iterator[Any] | None = None  # the first pass over `data`, at the point where it stopped
        self._size = 0  # bytes of the samples in memory
        self._digests: list[bytes] = []  # digests of the samples, where the samples are not kept
        self._ended = False  # whether a pass has reached the end of the data

    def __call__(self) -> Iterator[Any]:
        """Yields the samples of one pass. Raises FileError for a value that is not a sample or cannot be read, and if
        there are no samples; MisfitError if a sample that is read again differs."""
        position = 0
        while (samples := self._kept) is not None:
            if position == len(samples) and not self._extend(samples):
                return
            yield samples[position]
            position += 1
        del samples
        yield from islice(self._compared(iter(self._data)), position, None)

    def _extend(self, samples: list[Any]) -> bool:
        """Reads the next sample of the first pass and appends it to `samples`; returns False at the end of the pass.
        When the samples take more than the limit of bytes, only their digests are kept in memory."""
        if self._ended:
            return False
        self._source = iter(self._data) if self._source is None else self._source
        sample = self._next(self._source, len(samples))
        if sample is None:
            if not samples:
                raise FileError("calib_data: holds no samples. Give at least one.")
            self._ended, self._source = True, None
            return False
        samples.append(copied_to(sample, _CPU) if isinstance(sample, Sample) else sample)
        self._size += sum(leaf.nbytes for leaf in _leaves(sample) if isinstance(leaf, Tensor))
        if self._size > self._limit:
            self._digests, self._kept, self._source = [digest_of(sample) for sample in samples], None, None
        return True

    def _next(self, source: Iterator[Any], position: int) -> Any:
        try:
            return next((sample_of(value, position, self._model) for value in source), None)
        except OctavoError:
            raise
        except Exception as error:
            self._kept, self._source, self._digests = [], None, []
            lines = str(error).strip().splitlines()  # the message of a DataLoader's worker is its whole traceback
            fact = lines[-1].rstrip(".") if lines else type(error).__name__
            raise FileError(f"calib_data[{position}]: cannot be read ({fact}). Correct the data.") from error

    def _compared(self, source: Iterator[Any]) -> Iterator[Any]:
        """Yields the samples of `source`, another pass over the data. Raises MisfitError at a sample that differs from
        the first pass."""
        position = 0
        while (sample := self._next(source, position)) is not None:
            digest = digest_of(sample)
            if position == len(self._digests) and not self._ended:
                self._digests.append(digest)
            if self._digests[position : position + 1] != [digest]:
                self._refuse(position)
            yield sample
            position += 1
        if position < len(self._digests):
            self._refuse(position)
        self._ended = True

    def _refuse(self, position: int) -> None:
        fact = f"calib_data[{position}]: differs from the first pass, and the data are too large to keep in memory"
        remedy = f"Turn off shuffling and augmentation, or give at most {self._limit >> 20} MiB of data"
        raise MisfitError(f"{fact}. {remedy}.")


def _leaves(sample: Any) -> list[Any]:
    return tree_leaves((sample.args, sample.kwargs))


def digest_of(sample: Any) -> bytes:
    """Returns a digest of the values, shapes and dtypes of a sample's inputs."""
    digest = hashlib.blake2b()
    for leaf in map(_tensor, _leaves(sample)):
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            digest.update(memory_of(leaf.detach().cpu().contiguous()))
        else:  # the repr of another object may contain its address, so only its type counts
            plain = leaf is None or isinstance(leaf, (bool, int, float, str))
            digest.update(repr(leaf if plain else type(leaf)).encode())
    return digest.digest()
