"""Fingerprints that tell whether two models are the same: class, names and shapes of tensors, and weights."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .wrappers import inside


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
        names.update(f"{name} {tuple(tensor.shape)}\n".encode())
        if tensor.is_meta:
            known = False
        else:
            weights.update(f"{name} {tensor.dtype}\n".encode())
            weights.update(tensor_bytes(tensor))
    return {"class": kind, "names": names.hexdigest(), "weights": weights.hexdigest() if known else "unknown"}
