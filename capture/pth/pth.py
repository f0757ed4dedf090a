"""Reads and writes lists of calls in files of torch.save, as other tools make them. Runs no code from the files."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..call_arguments import noise_level
from ..errors import FileError, MisfitError, OctavoError, Unstorable
from ..files import Modes, writing
from ..sealed import open_regular
from ..space import check_space
from ..store.layout import Call
from ..store.writer import CaptureWriter
from ..tensors import dtype_name
from .pickles import (
    DATA_PICKLE,
    LEGACY_MAGIC,
    NOT_LOADED,
    Claims,
    NotAllowed,
    foreign,
    inspect_legacy,
    inspect_zip,
    looks_like,
)  # fmt: skip

HEAD = 512  # bytes read first, to recognise the format of the file
# the first bytes of a file that torch.save wrote before torch 1.6 with pickle protocol 0 or 1
LEGACY_START = f"L{LEGACY_MAGIC}L\n".encode()


def safe_torch_load(path: str | Path, map_location: Any = "cpu") -> Any:
    """Loads a file of torch.save that only holds data: tensors, numbers, strings and containers.

    Never runs code from the file, even with TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD. `map_location` has the meaning that it
    has in torch.load. Raises FileError if the file holds anything but data, claims more memory than it has bytes, or is
    not a file of torch.save.
    """
    path = Path(path)
    with open_regular(Path(os.path.realpath(path))) as (descriptor, size), os.fdopen(os.dup(descriptor), "rb") as file:
        head = file.read(HEAD)
        try:
            file.seek(0)
            inspect = inspect_zip if head.startswith(b"PK\x03\x04") else inspect_legacy
            if inspect is inspect_legacy and not head.startswith((b"\x80", LEGACY_START)):
                raise foreign(path, looks_like(head))
            claims = Claims(path, size)
            inspect(file, claims)
            file.seek(0)
            if claims.protocols == {2}:
                return torch.load(file, map_location=map_location, weights_only=True, mmap=False)
            if os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0") not in ("", "0"):
                fact = f"has pickle protocol {max(claims.protocols)}, which TORCH_FORCE_WEIGHTS_ONLY_LOAD refuses"
                raise FileError(
                    f"{path}: {fact}. Unset the variable, or save the file again with the default pickle_protocol."
                )
            return torch.load(file, map_location=map_location, weights_only=False, pickle_module=DATA_PICKLE)
        except OctavoError:
            raise
        except NotAllowed as exc:
            raise FileError(f"{path}: needs {exc}, which is not allowed in a data file. {NOT_LOADED}") from exc
        except Exception as exc:  # torch and pickle raise errors of any class for damaged files
            raise foreign(path, looks_like(head)) from exc


def load_samples(path: str | Path) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Loads a list of samples from a file of torch.save; returns (args, kwargs) for each sample.

    A sample holds the arguments of one call of the model: a dict of keyword arguments, or a list or tuple of positional
    ones. Raises FileError for a file that would run code when loaded, or that holds anything but samples; MisfitError
    for an empty list.
    """
    samples = safe_torch_load(path)
    if isinstance(samples, dict):
        samples = [samples]
    if not isinstance(samples, list | tuple):
        fact = f"expected a list of samples, found {type(samples).__name__}"
        raise FileError(f"{path}: {fact}. Save a list with the arguments of one call of the model in each entry.")
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    for number, sample in enumerate(samples):
        if isinstance(sample, dict) and all(isinstance(name, str) for name in sample):
            calls.append(((), dict(sample)))
        elif isinstance(sample, list | tuple):
            calls.append((tuple(sample), {}))
        else:
            fact = f"sample {number} is a {type(sample).__name__}, not a dict with names as keys, a list or a tuple"
            raise FileError(f"{path}: {fact}. Save the arguments of each call as a dict, list or tuple.")
    if not calls:
        raise MisfitError(f"{path}: is an empty list. Save the arguments of at least one call of the model.")
    return calls


def save_pth(path: str | Path, calls: Iterable[Call]) -> None:
    """Writes calls with torch.save, as a list with one entry for each call. The entry is the dict of the call's keyword
    arguments, or, for a call with only positional arguments, their tuple.

    Keeps the list in memory. Raises MisfitError for a call with both kinds of arguments, StorageError if the disk is
    full.
    """
    samples: list[Any] = []
    for call in calls:
        if call.args and call.kwargs:
            raise MisfitError(
                f"{path}: call {call.index} has both positional and keyword arguments, but a .pth file can hold only "
                "one kind. Capture without --pth."
            )
        samples.append(call.args or call.kwargs)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in _tensors(samples)}
    check_space(path, sum(storages.values()))
    with writing(Path(path), Modes().data) as sink:
        torch.save(samples, sink)  # type: ignore[arg-type]


def convert_pth(path: str | Path, directory: str | Path, component: str = "transformer") -> None:
    """Converts a torch.save file with a list of calls to a capture, as the calls of one prompt.

    `component` is the name of the denoiser under which the calls are stored. Raises FileError for a file that would run
    code when loaded or holds no list of calls, and for a value that a capture cannot store; MisfitError for an empty
    list; StorageError if the directory holds a capture or cannot be written.
    """
    samples = load_samples(path)
    manifest = {"pipeline": None, "source": Path(path).name, "prompts": 1, "dtype": _dtype(samples[0])}
    with CaptureWriter.create(directory, manifest) as writer:
        with writer.unit(0, {"prompt": None, "source": Path(path).name}) as unit:
            for index, (args, kwargs) in enumerate(samples):
                try:
                    unit.add(Call(component, index, None, noise_level(kwargs), None, args, kwargs))
                except Unstorable as error:
                    where = f"{path}: sample {index}: {error.fact.removeprefix(f'{component} input ')}"
                    raise FileError(f"{where}. Take this value out of the samples, and save them again.") from error
        writer.complete()


def _dtype(sample: tuple[tuple[Any, ...], dict[str, Any]]) -> str | None:
    """Returns the dtype of most floating-point values of a sample, None if the sample has none."""
    sizes: Counter[str] = Counter()
    for tensor in _tensors(sample):
        if tensor.is_floating_point():
            sizes[dtype_name(tensor.dtype)] += tensor.numel()
    return max(sizes, key=lambda name: sizes[name], default=None)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
