"""Fingerprints that tell whether two models are the same: class, names and shapes of tensors, and weights."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .paging import page_out
from .wrappers import inside

_PIECE = 1 << 18  # values that are hashed at once: they stay in the processor's cache
_COMPARED = (torch.float32, torch.float16, torch.bfloat16)  # the dtypes that models are loaded in


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order, without a copy for a contiguous tensor on the CPU."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def fingerprint(module: nn.Module) -> dict[str, str]:
    """The fingerprint of `module`, or of the module inside it: its `class`, `names` (digest of sorted names, shapes)
    and `weights` (digest of names, dtypes, bytes).

    Weights on the meta device have no bytes: `weights` is then "unknown", which fits any.
    """
    module = inside(module)
    return fingerprint_of(type(module).__name__, sorted(module.state_dict().items()))


def fingerprint_of(kind: str, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """The fingerprint of a module of class `kind` with these tensors, given in the order of their names."""
    names, weights = hashlib.sha256(), hashlib.sha256()
    known = True
    for name, tensor in tensors:
        names.update(_line(name, tensor))
        if tensor.is_meta:
            known = False
        else:
            weights.update(f"{name} {tensor.dtype}\n".encode())
            weights.update(tensor_bytes(tensor))
    return {"class": kind, "names": names.hexdigest(), "weights": weights.hexdigest() if known else "unknown"}


class Origin(NamedTuple):
    """The float model that a checkpoint was made of, to be known again in another dtype.

    `names`: as in `fingerprint`. `dtype`: of most of its values. `weights`: digests of the tensors cast to float32,
    float16 and bfloat16, by dtype.
    """

    kind: str
    names: str
    dtype: str
    weights: dict[str, str]

    @classmethod
    def of(cls, module: nn.Module) -> "Origin | None":
        """The origin of a checkpoint made of `module`; None where weights are on the meta device."""
        return cls.of_tensors(type(module).__name__, sorted(module.state_dict().items()))

    @classmethod
    def of_tensors(cls, kind: str, tensors: Iterable[tuple[str, Tensor]]) -> "Origin | None":
        """The origin of a checkpoint made of a module of class `kind` with these tensors, in the order of names."""
        names, values = hashlib.sha256(), Counter[torch.dtype]()
        digests: dict[str, dict[str, str]] = {_word(dtype): {} for dtype in _COMPARED}
        for name, tensor in tensors:
            if tensor.is_meta:
                return None
            names.update(_line(name, tensor))
            values[tensor.dtype] += tensor.numel() * tensor.is_floating_point()
            for dtype in _COMPARED:
                digests[_word(dtype)][name] = _digest(tensor, dtype)
        weights = {word: _joined(found.items()) for word, found in digests.items()}
        return cls(kind, names.hexdigest(), _word(_most(values)), weights)

    def other_structure(self, module: nn.Module) -> str | None:
        """The fact that `module` is of another class or has other tensors than the model of this origin, or None."""
        names = hashlib.sha256(b"".join(_line(*each) for each in sorted(module.state_dict().items()))).hexdigest()
        if type(module).__name__ != self.kind:
            return f"it is a {type(module).__name__} and not a {self.kind}"
        return None if names == self.names else "it has other tensors"

    def other_weights(self, module: nn.Module) -> str | None:
        """Both digests in short, where the weights of `module` differ from those of this origin in the narrower of
        both dtypes. None where they agree, and where they cannot be compared: neither dtype holds the other's values,
        or weights are on the meta device."""
        tensors, values = sorted(module.state_dict().items()), Counter[torch.dtype]()
        for _, tensor in tensors:
            values[tensor.dtype] += tensor.numel() * tensor.is_floating_point()
        now = _word(_most(values))
        dtype = self.dtype if now == _word(torch.float32) else now
        was, exact = self.weights.get(dtype), self.dtype in (dtype, _word(torch.float32))
        if was is None or not exact or any(tensor.is_meta for _, tensor in tensors):
            return None
        found = _weights_in(tensors, getattr(torch, dtype))
        return None if found == was else f"{found[:8]}, not {was[:8]}"


def _most(values: Counter[torch.dtype]) -> torch.dtype:
    """The dtype of most values; float32 without any, and for one that is not compared."""
    dtype = max(values, key=values.__getitem__, default=torch.float32)
    return dtype if dtype in _COMPARED else torch.float32


def _weights_in(tensors: list[tuple[str, Tensor]], dtype: torch.dtype) -> str:
    """The digest of tensors cast to `dtype`; several are hashed at a time, since hashlib frees the interpreter."""
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        digests = threads.map(lambda each: _digest(each[1], dtype), tensors)
        return _joined(zip((name for name, _ in tensors), digests, strict=True))


def _joined(digests: Iterable[tuple[str, str]]) -> str:
    return hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in digests).encode()).hexdigest()


def _digest(tensor: Tensor, dtype: torch.dtype) -> str:
    """The digest of a tensor's bytes, cast to `dtype` if it is a float tensor; needs the memory of one piece."""
    found, flat = hashlib.sha256(), tensor.detach().reshape(-1)
    for piece in flat.split(_PIECE):
        found.update(tensor_bytes(piece.to(dtype) if tensor.is_floating_point() else piece))
    page_out(tensor)
    return found.hexdigest()


def _line(name: str, tensor: Tensor) -> bytes:
    return f"{name} {tuple(tensor.shape)}\n".encode()


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
