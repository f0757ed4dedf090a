"""Notices values that are not finite while a pipeline runs: a picture made of NaN looks like any black picture."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from octavo.capture.errors import NumbersError

from .denoisers import denoisers


@contextmanager
def finite_outputs(pipe: Any) -> Iterator[None]:
    """Inside, a denoiser or decoder of `pipe` that gives a value which is not finite raises NumbersError."""
    parts: dict[str, Any] = getattr(pipe, "components", {})
    decoders = {f"{name}.decoder": getattr(each, "decoder", None) for name, each in parts.items() if _decodes(each)}
    watched = {**denoisers(pipe), **decoders}
    with ExitStack() as stack:
        for name, module in watched.items():
            if isinstance(module, nn.Module):
                stack.callback(module.register_forward_hook(partial(_check, name)).remove)
        yield


def _decodes(component: Any) -> bool:
    return isinstance(component, nn.Module) and callable(getattr(component, "decode", None))


def _check(name: str, module: nn.Module, args: Any, output: Any) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in _tensors(output)):
        remedy = "Use --dtype bfloat16 or float32; where the float model is sound, calibrate again."
        raise NumbersError(f"{name}: gave values that are not finite. {remedy}")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
