"""Computes fingerprints of models: digests of the class, of the tensors' names and shapes, and of the weights.

Models with equal fingerprints count as the same model.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .paging import page_out
from .tensors import dtype_name
from .wrappers import inside

_PIECE = 1 << 18  # values that are cast and hashed at once: 1 MiB of float32 fits into a processor's cache
_COMPARED = (torch.float32, torch.float16, torch.bfloat16)  # the dtypes that models are loaded in


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Returns the bytes of a tensor in row-major order, without a copy if it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def fingerprint(module: nn.Module) -> dict[str, str]:
    """Returns the fingerprint of `module`. If `module` is a wrapper, such as DataParallel, returns that of the module
    inside.

    The keys are `class`, `names` (digest of the sorted names and shapes of the tensors in the state dict) and `weights`
    (digest of their names, dtypes and bytes). A model with tensors on the meta device has `weights` "unknown", which
    matches any weights.
    """
    module = inside(module)
    return fingerprint_of(type(module).__name__, sorted(module.state_dict().items()))


def fingerprint_of(kind: str, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Returns the fingerprint of a module of class `kind` with `tensors`, pairs of name and tensor sorted by name."""
    names, weights = hashlib.sha256(), hashlib.sha256()
    complete = True
    for name, tensor in tensors:
        names.update(_line(name, tensor))
        if tensor.is_meta:
            complete = False
        else:
            weights.update(f"{name} {tensor.dtype}\n".encode())
            weights.update(tensor_bytes(tensor))
    return {"class": kind, "names": names.hexdigest(), "weights": weights.hexdigest() if complete else "unknown"}


class Origin(NamedTuple):
    """The fingerprint of the float model that a checkpoint was made from, in three dtypes.

    The three digests let Octavo recognise the model when it is loaded in another dtype. `kind` is the model's class,
    `names` the digest of the names and shapes of its tensors, `dtype` the dtype of most of its values. `weights` maps
    float32, float16 and bfloat16 to the digest of the tensors cast to that dtype.
    """

    kind: str
    names: str
    dtype: str
    weights: dict[str, str]

    @classmethod
    def of(cls, module: nn.Module) -> "Origin | None":
        """Returns the Origin, the fingerprint in three dtypes, of `module`; None if a weight is on the meta device."""
        return cls.of_tensors(type(module).__name__, sorted(module.state_dict().items()))

    @classmethod
    def of_tensors(cls, kind: str, tensors: Iterable[tuple[str, Tensor]]) -> "Origin | None":
        """Returns the Origin of a module of class `kind` with `tensors`, pairs of name and tensor sorted by name.

        Returns None if a tensor is on the meta device.
        """
        names, values = hashlib.sha256(), Counter[torch.dtype]()
        digests: dict[str, dict[str, str]] = {dtype_name(dtype): {} for dtype in _COMPARED}
        for name, tensor in tensors:
            if tensor.is_meta:
                return None
            names.update(_line(name, tensor))
            values[tensor.dtype] += tensor.numel() * tensor.is_floating_point()
            for dtype in _COMPARED:
                digests[dtype_name(dtype)][name] = _digest(tensor, dtype)
        weights = {word: _joined(by_name.items()) for word, by_name in digests.items()}
        return cls(kind, names.hexdigest(), dtype_name(_most(values)), weights)

    def other_structure(self, module: nn.Module) -> str | None:
        """Returns a text that says how `module` differs from the model of this fingerprint in its class, or in the
        names or shapes of its tensors. Returns None if they agree."""
        names = hashlib.sha256(b"".join(_line(*item) for item in sorted(module.state_dict().items()))).hexdigest()
        if type(module).__name__ != self.kind:
            return f"it is a {type(module).__name__} and not a {self.kind}"
        return None if names == self.names else "it has other tensors"

    def other_weights(self, module: nn.Module) -> str | None:
        """Returns None if the weights of `module` agree with this fingerprint. Otherwise returns a text with the
        beginnings of both digests of the weights, "DIGEST, not DIGEST".

        The weights are compared in the narrower of the two models' dtypes. Also returns None if they cannot be
        compared: if one model is float16 and the other bfloat16, because neither dtype represents the values of the
        other, or if a weight of `module` is on the meta device.
        """
        tensors, values = sorted(module.state_dict().items()), Counter[torch.dtype]()
        for _, tensor in tensors:
            values[tensor.dtype] += tensor.numel() * tensor.is_floating_point()
        now = dtype_name(_most(values))
        dtype = self.dtype if now == dtype_name(torch.float32) else now
        was, exact = self.weights.get(dtype), self.dtype in (dtype, dtype_name(torch.float32))
        if was is None or not exact or any(tensor.is_meta for _, tensor in tensors):
            return None
        digest = _weights_in(tensors, getattr(torch, dtype))
        return None if digest == was else f"{digest[:8]}, not {was[:8]}"


def _most(values: Counter[torch.dtype]) -> torch.dtype:
    """Returns the dtype with the largest count in `values`, which counts a model's float values by dtype.

    Returns float32 if there are no counts, or if that dtype is not float32, float16 or bfloat16.
    """
    dtype = max(values, key=values.__getitem__, default=torch.float32)
    return dtype if dtype in _COMPARED else torch.float32


def _weights_in(tensors: list[tuple[str, Tensor]], dtype: torch.dtype) -> str:
    """Returns one digest of all `tensors`, pairs of name and tensor; casts float tensors to `dtype` before hashing.

    Threads hash several tensors at once.
    """
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        digests = threads.map(lambda item: _digest(item[1], dtype), tensors)
        return _joined(zip((name for name, _ in tensors), digests, strict=True))


def _joined(digests: Iterable[tuple[str, str]]) -> str:
    return hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in digests).encode()).hexdigest()


def _digest(tensor: Tensor, dtype: torch.dtype) -> str:
    """Returns the digest of a tensor's bytes; a float tensor is cast to `dtype` before, _PIECE values at a time."""
    digest, flat = hashlib.sha256(), tensor.detach().reshape(-1)
    for piece in flat.split(_PIECE):
        digest.update(tensor_bytes(piece.to(dtype) if tensor.is_floating_point() else piece))
    page_out(tensor)
    return digest.hexdigest()


def _line(name: str, tensor: Tensor) -> bytes:
    return f"{name} {tuple(tensor.shape)}\n".encode()
