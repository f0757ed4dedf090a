"""Converts a user's calibration data to calls of the model, the same ones in every pass."""

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

KEPT = 1 << 30  # bytes of samples kept in memory: about 1700 pictures of 224 x 224; more are read again in each pass
_CPU = torch.device("cpu")


class Sample(NamedTuple):
    """A call: the arguments for the model, and for messages where they come from and what to do if they do not fit."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    source: str = ""
    remedy: str = ""


def sample_of(value: Any, position: int, model: nn.Module | None = None) -> Any:
    """A call from a dict of keyword arguments, a list or tuple of positional arguments, a pair (args, kwargs) where
    `model` takes it, or a single tensor. NumPy arrays become tensors.

    Raises FileError for anything else.
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
    for given in (*args, *kwargs.values()):
        if fault := _foreign(given):
            raise FileError(f"{source}: {fault}")
    if name := next((name for name in kwargs if not isinstance(name, str)), None):
        raise FileError(f"{source}: {name!r} is not the name of an input. Give a dict of keyword arguments.")
    named = {name: _tensor(given) for name, given in kwargs.items()}
    return Sample(tuple(map(_tensor, args)), named, source)


def _is_pair(value: Any, model: nn.Module | None) -> bool:
    """Whether a sample is (args, kwargs), as torch.export takes the inputs of a model."""
    shaped = isinstance(value, (list, tuple)) and [type(each) for each in value] == [tuple, dict]
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
    """Why a value is no input of a model, or nothing."""
    if type(value).__module__.partition(".")[0] == "PIL":
        return "holds a PIL picture. Give the tensor that the model's preprocessing makes of it."
    if isinstance(value, np.ndarray) and value.dtype.kind not in "biufc":
        return f"holds a NumPy array of dtype {value.dtype}. Give numbers."
    return ""


def _unknown(value: Any) -> str:
    return f"expected a dict, list or tuple of inputs, found {type(value).__name__}. Give one."


def calls_of(data: Iterable[Any] | None, model: nn.Module | None = None) -> Callable[[], Iterable[Any]] | None:
    """A function that gives the calls anew each time; None where there are none. A list is held as it is, and so is
    what an iterator gives. The samples of other iterables, such as a DataLoader, are those of the first pass (Passes).

    Raises FileError for data that are not an iterable of samples.
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
    """Gives in every pass the samples that the first pass over `data` gave, though data may be shuffled or augmented.

    Up to `limit` bytes of samples are copied and kept. Larger data are read again in each pass, and each sample is
    compared with its digest of the first pass. The samples up to `limit` are read again at once: data that are shuffled
    or augmented are refused there, and not after a whole pass.
    """

    def __init__(self, data: Iterable[Any], model: nn.Module | None = None, limit: int = KEPT) -> None:
        self._data, self._model, self._limit = data, model, limit
        self._kept: list[Any] | None = []  # None: the samples are too large
        self._source: Iterator[Any] | None = None  # the first pass over `data`, where it stopped
        self._size = 0  # bytes of the samples kept
        self._digests: list[bytes] = []  # of samples that are not kept
        self._ended = False  # whether a pass came to its end

    def __call__(self) -> Iterator[Any]:
        """One pass. Raises FileError for a sample that is none or cannot be read, and without any; MisfitError for
        samples that are read again and differ."""
        position = 0
        while (kept := self._kept) is not None:
            if position == len(kept) and not self._extend(kept):
                return
            yield kept[position]
            position += 1
        del kept
        yield from islice(self._compared(iter(self._data)), position, None)

    def _extend(self, kept: list[Any]) -> bool:
        """Adds the next sample of the first pass; False at its end. Nothing is kept any more above the limit."""
        if self._ended:
            return False
        self._source = iter(self._data) if self._source is None else self._source
        sample = self._next(self._source, len(kept))
        if sample is None:
            if not kept:
                raise FileError("calib_data: holds no samples. Give some.")
            self._ended, self._source = True, None
            return False
        kept.append(copied_to(sample, _CPU) if isinstance(sample, Sample) else sample)
        self._size += sum(leaf.nbytes for leaf in _leaves(sample) if isinstance(leaf, Tensor))
        if self._size > self._limit:
            self._digests, self._kept, self._source = [digest_of(each) for each in kept], None, None
        return True

    def _next(self, source: Iterator[Any], position: int) -> Any:
        try:
            return next((sample_of(value, position, self._model) for value in source), None)
        except OctavoError:
            raise
        except Exception as error:
            self._kept, self._source, self._digests = [], None, []
            lines = str(error).strip().splitlines()  # a worker gives its whole traceback
            fact = lines[-1].rstrip(".") if lines else type(error).__name__
            raise FileError(f"calib_data[{position}]: cannot be read ({fact}). Correct the data.") from error

    def _compared(self, source: Iterator[Any]) -> Iterator[Any]:
        """The samples of `source`, each as in the passes before."""
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
        fact = f"calib_data[{position}]: another sample than in the pass before, and all together are too large to keep"
        remedy = f"Give data that are not shuffled or augmented, or at most {self._limit >> 20} MiB of them"
        raise MisfitError(f"{fact}. {remedy}.")


def _leaves(sample: Any) -> list[Any]:
    return tree_leaves((sample.args, sample.kwargs))


def digest_of(sample: Any) -> bytes:
    """A digest of the values, shapes and dtypes of a sample's inputs."""
    digest = hashlib.blake2b()
    for leaf in map(_tensor, _leaves(sample)):
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            digest.update(memory_of(leaf.detach().cpu().contiguous()))
        else:  # the text of another object may hold its address
            plain = leaf is None or isinstance(leaf, (bool, int, float, str))
            digest.update(repr(leaf if plain else type(leaf)).encode())
    return digest.digest()
