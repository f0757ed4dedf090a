"""Stops a pipeline whose networks output NaN or infinity. Without this check the picture would just be black."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from octavo.capture.errors import NumbersError

from .denoisers import denoisers


@contextmanager
def finite_outputs(pipe: Any) -> Iterator[None]:
    """Inside the `with` block, raises NumbersError when a denoiser or decoder of `pipe` outputs NaN or infinity."""
    parts: dict[str, Any] = getattr(pipe, "components", {})
    decoders = {f"{name}.decoder": getattr(part, "decoder", None) for name, part in parts.items() if _decodes(part)}
    modules = {**denoisers(pipe), **decoders}
    with ExitStack() as stack:
        for name, module in modules.items():
            if isinstance(module, nn.Module):
                stack.callback(module.register_forward_hook(partial(_check, name)).remove)
        yield


def _decodes(component: Any) -> bool:
    return isinstance(component, nn.Module) and callable(getattr(component, "decode", None))


def _check(name: str, module: nn.Module, args: Any, output: Any) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in _tensors(output)):
        remedy = "Use --dtype bfloat16 or float32. If the float model works, calibrate again."
        raise NumbersError(f"{name}: its output has values that are not finite. {remedy}")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
