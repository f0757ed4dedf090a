"""Makes inputs for a calibration without data: distils them from the training statistics that batch norms store.

Cai et al., ZeroQ: a novel zero shot quantization framework, arXiv 2001.00281, 2020: starting from normal noise, inputs
are optimised until the input of each batch norm has the mean and the standard deviation that the batch norm stores.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from octavo.capture.errors import NumbersError, UsageError

from ..replay.calls import Progress, device_of, evaluating, run, silent
from ..replay.hooks import hooked, input_of
from ..replay.user_data import Sample
from .batch_norms import has_norms, has_statistics

_BUDGET = 3e12  # floating-point operations of all iterations: about a minute on one core
_LEAST = 30  # smallest number of iterations for a batch
# (number of batches, inputs in a batch), largest first; the first pair is used that the budget affords
_BATCHES = ((4, 32), (4, 16), (2, 16), (1, 16), (1, 8), (1, 4), (1, 2), (1, 1))
_CALLS = 4  # smallest number of calls, where there are so many inputs, so that one can be held out
_RATE = 0.1  # learning rate of Adam at the start
# smallest deviation that a channel's loss is divided by, as a share of the mean deviation of the layer's channels
_NARROW = 0.05


def synthetic_calls(
    model: nn.Module, shape: Sequence[int], *, seed: int = 0, most: int = 200, progress: Progress = silent
) -> list[Sample]:
    """Makes calls of `model`, each with one synthetic input tensor of the shape `shape` (batch, ...), or of a larger
    batch.

    For a model that has batch norms with running statistics, inputs are optimised until they reproduce these
    statistics. There are at least four calls, or fewer if the model needs so many operations that four inputs would
    take too long. For other models, a single call has uniform numbers from 0 to 1, and `warnings_of` warns of that. The
    result depends only on the arguments; `seed` is the seed of the random numbers. The number of iterations, at most
    `most`, depends on the model's number of operations. Also works inside torch.inference_mode().

    Raises UsageError for an invalid shape, and for a model through which no gradient reaches a batch norm's input;
    MisfitError for a shape that the model does not accept; NumbersError if the inputs do not stay finite; DeviceError
    when memory runs out.
    """
    if not shape or min(shape) < 1:
        raise UsageError(f"input_shape: {list(shape)} is not a shape. Give sizes of at least 1.")
    generator = torch.Generator().manual_seed(seed)
    if not has_norms(model):
        x = torch.rand(tuple(shape), generator=generator)
        return [_sample(x.to(_dtype_of(model)))]
    with torch.inference_mode(False):
        model = _differentiable(model)
        count, batch, iterations = _plan(model, shape)
        iterations = min(iterations, most)
        steps = iter(progress("distil inputs", range(count * iterations), count * iterations))
        calls = []
        for _ in range(count):
            x = torch.randn(batch, *shape[1:], generator=generator)
            inputs = _distilled(model, x, iterations, steps)
            calls += [_sample(part) for part in inputs.split(max(shape[0], batch * count // _CALLS))]
        next(steps, None)
    return calls


def _sample(x: Tensor) -> Sample:
    return Sample((x,), {}, f"input_shape {list(x.shape)}", "Give the shape that the model takes, or data.")


def _differentiable(model: nn.Module) -> nn.Module:
    """Returns a model that autograd can differentiate: `model` itself, or a copy if it has tensors that were made in
    inference mode."""
    if not any(tensor.is_inference() for tensor in chain(model.parameters(), model.buffers())):
        return model
    try:
        return copy.deepcopy(model)
    except Exception as error:  # of any type: modules may define how they are copied
        fact = "making inputs needs gradients, which a model made in torch.inference_mode() does not have"
        raise UsageError(f"input_shape: {fact}. Load the model outside of torch.inference_mode().") from error


def warnings_of(model: nn.Module) -> list[str]:
    """Returns the warnings about the synthetic inputs of this model, one line each: none if it has batch norms to
    distil from."""
    if has_norms(model):
        return []
    fact = "there are no data, and the model has no batch norms to make inputs from"
    effect = "So ranges come from uniform random numbers and fit no real inputs"
    return [f"calib_data: {fact}. {effect}. Give calib_data (--images)."]


def _plan(model: nn.Module, shape: Sequence[int]) -> tuple[int, int, int]:
    """Returns the number of batches, the number of inputs in a batch, and the number of iterations, for a model whose
    input has the shape `shape`.

    The numbers of batches and of inputs come from _BATCHES, which lists pairs of them, the largest first: the first
    pair with which at least 30 iterations (_LEAST) fit in _BUDGET, the floating-point operations of about a minute. A
    batch has at least as many inputs as the batch in `shape`. There are as many iterations as _BUDGET allows, but at
    least 30.
    """
    counter = FlopCounterMode(display=False)
    with evaluating(model), counter:
        run(model, _sample(torch.zeros(1, *shape[1:], dtype=_dtype_of(model))), 0)
    flops = 3 * max(1, counter.get_total_flops())  # a backward pass costs as much as two forward passes
    count, batch = next(
        ((count, size) for count, size in _BATCHES if count * size * flops * _LEAST <= _BUDGET or size <= shape[0]),
        _BATCHES[-1],
    )
    batch = max(batch, shape[0])
    return count, batch, max(_LEAST, int(_BUDGET / (count * batch * flops)))


def _distilled(model: nn.Module, x: Tensor, iterations: int, steps: Iterator[int]) -> Tensor:
    """Optimises the inputs `x` by `iterations` steps of Adam in float32, and returns them in the model's dtype. `steps`
    is advanced by one for each step, to show the progress."""
    x, dtype = x.to(device_of(model), torch.float32).requires_grad_(), _dtype_of(model)
    optimizer = torch.optim.Adam([x], _RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    with evaluating(model), torch.enable_grad(), statistics_losses(model) as losses:
        for _ in range(iterations):
            next(steps, None)
            losses.clear()
            run(model, _sample(x.to(dtype)), 0)
            if not losses or not losses[0].requires_grad:
                fact = "no inputs can be made, since no batch norm in the model's forward passes gradients on"
                raise UsageError(f"input_shape: {fact}. Give calib_data (--images).")
            x.grad = torch.autograd.grad(torch.stack(losses).mean(), x)[0]
            optimizer.step()
            schedule.step()
    if not bool(x.isfinite().all()):
        raise NumbersError("batch norms: inputs made from their statistics are not finite. Give calib_data (--images).")
    return x.detach().to(dtype)


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), torch.float32)


@contextmanager
def statistics_losses(model: nn.Module) -> Iterator[list[Tensor]]:
    """Yields a list, to which each call of a batch norm inside the `with` statement appends a loss. The loss compares
    the batch norm's input with the stored statistics: the squared difference of the means plus that of the standard
    deviations, in units of the stored standard deviation, averaged over the channels."""
    losses: list[Tensor] = []

    def measure(norm: nn.BatchNorm2d, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        x = input_of(args, kwargs).float()
        axes = [axis for axis in range(x.ndim) if axis != 1]
        var, mean = torch.var_mean(x, axes, correction=0)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        deviation = (norm.running_var.float() + norm.eps).sqrt()
        width = torch.maximum(deviation, _NARROW * deviation.mean())
        distance = (mean - norm.running_mean) / width
        losses.append(distance.square().mean() + (((var + norm.eps).sqrt() - deviation) / width).square().mean())

    norms = [name for name, module in model.named_modules() if has_statistics(module)]
    with hooked(model, dict.fromkeys(norms, measure)):
        yield losses
