"""Converts nested arguments to JSON, in the form that tree.py describes."""

import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from ..errors import Unstorable
from .tree import MAX_DEPTH

# most values in one argument: lists that contain the same list several times can expand to a huge JSON
MAX_VALUES = 100_000
TENSOR_TYPES = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)

PutTensor = Callable[[torch.Tensor, str], Any]


def encode(value: object, put_tensor: PutTensor, path: str = "value", owner: str = "") -> Any:
    """Returns the JSON form (see tree.py) of `value`, an argument of a call.

    `put_tensor(tensor, path)` stores a tensor elsewhere and returns the JSON value that stands for the tensor.

    Error messages name the value by `path` ("added_cond_kwargs.time_ids") and `owner` ("transformer input"). An
    OrderedDict or defaultdict is stored as a dict. Raises Unstorable for any other type that cannot be restored
    exactly, for nesting deeper than MAX_DEPTH and for more than MAX_VALUES values.
    """
    return _encode(value, put_tensor, path, owner, 0, iter(range(MAX_VALUES)))


def _encode(value: object, put: PutTensor, path: str, owner: str, depth: int, budget: Iterator[int]) -> Any:
    if depth > MAX_DEPTH:
        raise Unstorable(owner, path, f"nested deeper than {MAX_DEPTH} levels")
    if next(budget, None) is None:
        raise Unstorable(owner, path, f"holds more than {MAX_VALUES} values")

    def inner(item: object, name: str) -> Any:
        return _encode(item, put, name, owner, depth + 1, budget)

    kind = type(value)
    if kind in SCALARS:
        return SCALARS[kind](value)
    if isinstance(value, list | tuple) and kind in (list, tuple, torch.Size):
        items = [inner(item, f"{path}[{number}]") for number, item in enumerate(value)]
        return items if kind is list else {kind.__name__: items}
    if isinstance(value, dict) and kind in (dict, OrderedDict, defaultdict):
        return {"dict": [[inner(key, f"{path} key"), inner(item, f"{path}.{key}")] for key, item in value.items()]}
    if isinstance(value, torch.Tensor) and kind in TENSOR_TYPES:
        return {"tensor": put(value, path)}
    if isinstance(value, np.generic) and value.dtype.kind in "biufc":
        return {"numpy": [value.dtype.str, value.tobytes().hex()]}
    name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    raise Unstorable(owner, path, f"cannot store a value of type {name}")


def _encode_int(value: int) -> Any:
    return value if -(2**63) <= value < 2**64 else {"int": hex(value)}


def _encode_float(value: float) -> Any:
    return value if math.isfinite(value) else {"float": repr(value)}


def _encode_str(value: str) -> Any:
    # reading JSON would join two neighbouring surrogates into one character
    if any("\ud800" <= character <= "\udfff" for character in value):
        return {"str": value.encode("utf-8", "surrogatepass").hex()}
    return value


# the functions that encode a value without parts, by its type
SCALARS: dict[type, Callable[[Any], Any]] = {
    type(None): lambda value: value,
    bool: lambda value: value,
    int: _encode_int,
    float: _encode_float,
    str: _encode_str,
    bytes: lambda value: {"bytes": value.hex()},
    complex: lambda value: {"complex": [repr(value.real), repr(value.imag)]},
    torch.dtype: lambda value: {"dtype": str(value).removeprefix("torch.")},
    torch.device: lambda value: {"device": str(value)},
}
