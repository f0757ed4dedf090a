"""Decodes the JSON form of nested arguments, which keeps the type of every value; `tree_encoder` makes that form.

Values that JSON itself restores exactly are written as they are: null, true, 7, 0.5, "text", [lists]. Every other value
is an object with one key, the tag of its type: {"tuple": [...]}, {"dict": [[key, value], ...]}, {"Size": [...]},
{"dtype": "float16"}, {"device": "cuda:0"}, {"float": "inf"}, {"int": "0x..."}, {"str": hex}, {"bytes": hex},
{"complex": [re, im]}, {"numpy": [dtype, hex]}, {"tensor": the value that put_tensor returned}.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

MAX_DEPTH = 16  # most levels of nesting in one argument

GetTensor = Callable[[Any], Any]


def decode(tree: Any, get_tensor: GetTensor) -> Any:
    """Restores an argument of a call from its JSON form `tree`, which `tree_encoder.encode` made.

    `get_tensor` receives the JSON value that stands for a tensor (what the encoder's `put_tensor` returned) and returns
    the tensor. Imports torch only for sizes, dtypes and devices. Raises ValueError, TypeError, KeyError or
    AttributeError for a `tree` that `encode` did not make.
    """
    return _decode(tree, get_tensor, 0)


def _decode(tree: Any, get: GetTensor, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    if isinstance(tree, list):
        return [_decode(item, get, depth + 1) for item in tree]
    ((tag, content),) = tree.items()
    if tag == "tensor":
        return get(content)
    if tag == "dict":
        return {_decode(key, get, depth + 1): _decode(item, get, depth + 1) for key, item in content}
    if tag == "tuple":
        return tuple(_decode(item, get, depth + 1) for item in content)
    return TAGS[tag](content)


def _decode_size(content: list[int]) -> "torch.Size":
    import torch

    return torch.Size(content)


def _decode_dtype(name: str) -> "torch.dtype":
    import torch

    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name} is not a dtype")
    return dtype


def _decode_device(name: str) -> "torch.device":
    import torch

    try:
        return torch.device(name)
    except RuntimeError as exc:
        raise ValueError(f"{name} is not a device") from exc


def _decode_numpy(content: list[str]) -> np.generic:
    code, raw = content
    dtype = np.dtype(code)
    if dtype.kind not in "biufc":
        raise ValueError(f"{code} is not a number")
    return np.frombuffer(bytes.fromhex(raw), dtype=dtype, count=1)[0]


# the functions that decode the content of each tag; `_decode` itself handles tensor, dict and tuple
TAGS: dict[str, Callable[[Any], Any]] = {
    "Size": _decode_size,
    "int": lambda content: int(content, 16),
    "float": lambda content: {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[content],
    "str": lambda content: bytes.fromhex(content).decode("utf-8", "surrogatepass"),
    "bytes": bytes.fromhex,
    "complex": lambda content: complex(float(content[0]), float(content[1])),
    "dtype": _decode_dtype,
    "device": _decode_device,
    "numpy": _decode_numpy,
}
