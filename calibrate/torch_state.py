"""Sets torch's global state: default dtype and device, autocast, precision. Calibration runs in torch's initial state;
the model's forward runs with the default dtype and device that the caller had set."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch


class Defaults(NamedTuple):
    """torch's default dtype and default device: those of tensors that are made without naming a dtype or a device."""

    dtype: torch.dtype
    device: torch.device

    @contextmanager
    def apply(self) -> Iterator[None]:
        """Makes this dtype and this device torch's defaults, inside the `with` statement."""
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
    """Puts torch into its initial state, inside the `with` statement: default dtype float32, default device CPU, no
    autocast, no inference mode, float32 matrix products in full precision, gradients enabled. Afterwards the caller's
    state is restored."""
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
    """Restores the default dtype and device that torch had before `with settled()` was entered, inside the `with`
    statement, because the model's forward may rely on them. Only for use inside `with settled()`."""
    caller = _CALLER.get()
    if caller == PLAIN:
        yield
        return
    with caller.apply():
        yield


def initial() -> bool:
    """Returns whether torch's default dtype and device were float32 and CPU before `with settled()` was entered, so
    that nothing has to be set for the model's forward or for the hooks in it."""
    caller = _CALLER.get()
    return caller is PLAIN or caller == PLAIN


@contextmanager
def computing() -> Iterator[None]:
    """Sets the default dtype to float32 and the default device to CPU, inside the `with` statement, for hooks that
    compute during the model's forward. Only for use inside `with calling()`, which has set the defaults of the model's
    user."""
    if _CALLER.get() == PLAIN:
        yield
        return
    with PLAIN.apply():
        yield


@contextmanager
def _precise() -> Iterator[None]:
    """Makes torch compute float32 matrix products in float32, not in tf32 or bfloat16, inside the `with` statement."""
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
