"""Global state of torch: calibration computes in a state of its own, and calls the model in the state of its caller."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch


class Defaults(NamedTuple):
    """The dtype and the device of tensors that are made without one."""

    dtype: torch.dtype
    device: torch.device

    @contextmanager
    def apply(self) -> Iterator[None]:
        """Makes them torch's defaults while inside."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                yield
        finally:
            torch.set_default_dtype(before)


PLAIN = Defaults(torch.float32, torch.device("cpu"))
_CALLER: ContextVar[Defaults] = ContextVar("caller", default=PLAIN)  # those outside of the outermost `settled`


@contextmanager
def settled() -> Iterator[None]:
    """Inside, torch is in the state it starts with: defaults float32 and CPU, neither autocast nor inference mode,
    float32 products in full precision, gradients enabled. Afterwards everything is as the caller left it."""
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
    """Inside `settled`, makes the defaults those of the caller, for a forward that may rely on them."""
    caller = _CALLER.get()
    if caller == PLAIN:
        yield
        return
    with caller.apply():
        yield


@contextmanager
def computing() -> Iterator[None]:
    """Inside `calling`, makes the defaults plain again, for a hook that computes."""
    if _CALLER.get() == PLAIN:
        yield
        return
    with PLAIN.apply():
        yield


@contextmanager
def _precise() -> Iterator[None]:
    """Computes float32 matrix products in float32 while inside, not in tf32 or bfloat16."""
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
