"""Sets torch's global state: its initial state for calibration, the caller's defaults for the model's forward."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch


class Defaults(NamedTuple):
    """torch's default dtype and default device, for tensors that are made without naming them."""

    dtype: torch.dtype
    device: torch.device

    @contextmanager
    def apply(self) -> Iterator[None]:
        """While the block runs, makes this dtype and this device torch's defaults."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                yield
        finally:
            torch.set_default_dtype(before)


PLAIN = Defaults(torch.float32, torch.device("cpu"))
_CALLER: ContextVar[Defaults] = ContextVar("caller", default=PLAIN)  # torch's defaults where `settled` was entered


@contextmanager
def settled() -> Iterator[None]:
    """While the block runs, torch is in its initial state: default dtype float32, default device CPU, no autocast, no
    inference mode, float32 matrix products in full precision, gradients enabled. Afterwards the caller's state is
    restored."""
    caller = _CALLER.set(Defaults(torch.get_default_dtype(), torch.get_default_device()))
    try:
        with ExitStack() as stack:
            stack.enter_context(PLAIN.apply())
            stack.enter_context(torch.inference_mode(False))
            for kind in ("cpu", "cuda", "npu"):
                if kind == "cpu" or hasattr(torch, kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            stack.enter_context(_precise())
            stack.enter_context(torch.enable_grad())
            yield
    finally:
        _CALLER.reset(caller)


@contextmanager
def calling() -> Iterator[None]:
    """Used inside `settled`: while the block runs, restores the caller's default dtype and device, because the model's
    forward may rely on them."""
    caller = _CALLER.get()
    if caller == PLAIN:
        yield
        return
    with caller.apply():
        yield


@contextmanager
def computing() -> Iterator[None]:
    """Used inside `calling`: while the block runs, the defaults are float32 and CPU again, for hooks that compute."""
    if _CALLER.get() == PLAIN:
        yield
        return
    with PLAIN.apply():
        yield


@contextmanager
def _precise() -> Iterator[None]:
    """While the block runs, computes float32 matrix products in float32, not in tf32 or bfloat16."""
    mkldnn: Any = torch.backends.mkldnn
    backends = [mkldnn.matmul, mkldnn.conv, torch.backends.cuda.matmul]
    before = [(backend, backend.fp32_precision) for backend in backends]
    changed = [(backend, word) for backend, word in before if word not in ("none", "ieee")]
    try:
        for backend, _ in changed:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, word in changed:
            backend.fp32_precision = word
