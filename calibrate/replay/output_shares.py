"""Estimates the share of each quantized layer in the squared error of the model's output, from one backward pass.

To first order, the error of the output is the sum over the layers of J e, where e is the error of a layer's own output
and J the derivative of the model's output with respect to it. The share of a layer is the inner product of J e with the
error E of the output. Backpropagation of E gives the products of E with J for all layers at once.

The SQNR of single layers does not say which of them matter: on the bundled pipeline, the three layers with the lowest
SQNR cause less than a tenth of the output's error.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from octavo.capture.errors import OctavoError

from ..layers.modules import QuantizedLayer
from .calls import Call, Stopped, evaluating, run
from .sqnr import beside, tensors_in

SAVED = 1 << 30  # bytes that a backward pass may always keep in memory, also for a model that is smaller than this


class _Product(torch.autograd.Function):
    """Returns a copy of `output`, the output of a layer. In the backward pass, calls `add` with the sum of gradient *
    `error`, where the gradient is that of `output`, and `error` is the error of the quantized layer's output, of the
    same shape. `leaf` is a tensor that requires a gradient, so that autograd also follows a model whose parameters
    require none."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, leaf: Tensor, error: Tensor, add: Callable[[float], None]) -> Tensor:
        ctx.save_for_backward(error)
        ctx.add = add
        return output.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (error,) = ctx.saved_tensors
        ctx.add(float((gradients[0].to(torch.float32) * error.to(torch.float32)).sum()))
        return gradients[0], torch.zeros(()), None, None


def output_shares(
    model: nn.Module,
    makers: Mapping[str, Callable[[], QuantizedLayer]],
    call: Call,
    exact: Sequence[Tensor],
    limit: float,
) -> dict[str, float] | None:
    """Returns a dict from layer name to the layer's share in the squared error of the output of `model`, estimated on
    `call`. The shares add up to 1. A layer whose error reduces that of others has a negative share.

    `makers` is a dict from layer name to a function that returns the 8-bit layer; `model` has its float layers, and
    `exact` are the tensors of its output. Runs the model once with 8-bit layers and once in float, followed by a
    backward pass. Returns None if the backward pass would keep more than `limit` bytes in memory, or does not work on
    this model or device, or if the output has no error.
    """
    with evaluating(model), beside(model, makers, lambda *seen: seen[-1]):
        pairs = zip(tensors_in(run(model, call, 0)), exact, strict=True)
        errors = [other - own.to(other.device) for other, own in pairs]
    largest = max((float(error.abs().max()) for error in errors if error.numel()), default=0.0)
    if not 0.0 < largest < float("inf"):
        return None
    shares, leaf = dict.fromkeys(makers, 0.0), torch.zeros((), requires_grad=True)

    def add(name: str, product: float) -> None:
        shares[name] += product

    def track(name: str, module: nn.Module, layer: QuantizedLayer, x: Tensor, output: Tensor, other: Tensor) -> Tensor:
        return cast(Tensor, _Product.apply(output, leaf, other - output.detach(), partial(add, name)))

    try:
        with evaluating(model), torch.enable_grad():
            with _limited(model, limit), beside(model, makers, track):
                outputs = tensors_in(run(model, call, 0))
            used = [(y, error / largest) for y, error in zip(outputs, errors, strict=True) if y.requires_grad]
            torch.autograd.grad([y for y, _ in used], leaf, [error for _, error in used])
    except (OctavoError, RuntimeError, ValueError):  # a model without derivatives, too little memory, or Stopped
        return None
    whole = sum(shares.values())
    return {name: share / whole for name, share in shares.items()} if whole > 0.0 else None


@contextmanager
def _limited(model: nn.Module, limit: float) -> Iterator[None]:
    """Raises Stopped from the forward of `model`, inside the `with` statement, as soon as autograd keeps more than
    `limit` bytes for the backward pass. The model's weights, which are in memory anyway, do not count."""
    seen = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            kept += storage.nbytes()
            if kept > limit:
                raise Stopped
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
