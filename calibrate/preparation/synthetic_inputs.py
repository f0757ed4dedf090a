"""Inputs for a calibration without data, distilled from what batch norms remember of the training data.

Cai et al., ZeroQ: a novel zero shot quantization framework, arXiv 2001.00281, 2020: starting from normal noise, inputs
are optimised until the input of each batch norm has the mean and the deviation that it has stored.
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

_BUDGET = 3e12  # flops of all iterations: about a minute of one core
_LEAST = 30  # iterations of a batch
_BATCHES = ((4, 32), (4, 16), (2, 16), (1, 16), (1, 8), (1, 4), (1, 2), (1, 1))  # how many, of how many inputs
_CALLS = 4  # at least, so that one can be held out
_RATE = 0.1
_NARROW = 0.05  # of a layer's mean deviation: a channel narrower than this counts as that wide


def synthetic_calls(
    model: nn.Module, shape: Sequence[int], *, seed: int = 0, most: int = 200, progress: Progress = silent
) -> list[Sample]:
    """Calls of `model` with one input (batch, ...), `shape` but for the batch, which is at least that of `shape`.

    Distilled where there are batch norms with statistics, else uniform numbers of 0 to 1, of which `warnings_of` tells.
    Deterministic; the number of iterations, at most `most`, follows from the model's flops. Works in inference mode.

    Raises UsageError for a shape that is none and a model without gradients, MisfitError for a shape that the model
    does not take, DeviceError without memory.
    """
    if not shape or min(shape) < 1:
        raise UsageError(f"input_shape: {list(shape)} is no shape of inputs. Give sizes of 1 and more.")
    generator = torch.Generator().manual_seed(seed)
    if not has_norms(model):
        x = torch.rand(tuple(shape), generator=generator)
        return [_sample(x.to(_dtype_of(model)))]
    with torch.inference_mode(False):
        model = _differentiable(model)
        count, batch, iterations = _plan(model, shape)
        iterations = min(iterations, most)
        steps = iter(progress("distil", range(count * iterations), count * iterations))
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
    """The model, or a copy where its tensors were made in inference mode, which autograd does not take."""
    if not any(tensor.is_inference() for tensor in chain(model.parameters(), model.buffers())):
        return model
    try:
        return copy.deepcopy(model)
    except Exception as error:  # of any kind: modules may copy themselves
        raise UsageError("input_shape: inputs are distilled with gradients. Leave torch.inference_mode().") from error


def warnings_of(model: nn.Module) -> list[str]:
    """Warnings about inputs made up for this model, one line each."""
    if has_norms(model):
        return []
    return ["calib_data: there is none, and no batch norm remembers any; the ranges are those of uniform numbers."]


def _plan(model: nn.Module, shape: Sequence[int]) -> tuple[int, int, int]:
    """How many batches, of how many inputs, in how many iterations: the first of the table that is affordable."""
    counter = FlopCounterMode(display=False)
    with evaluating(model), counter:
        run(model, _sample(torch.zeros(1, *shape[1:], dtype=_dtype_of(model))), 0)
    flops = 3 * max(1, counter.get_total_flops())  # a pass back costs two passes forth
    count, batch = next(
        ((count, size) for count, size in _BATCHES if count * size * flops * _LEAST <= _BUDGET or size <= shape[0]),
        _BATCHES[-1],
    )
    batch = max(batch, shape[0])
    return count, batch, max(_LEAST, int(_BUDGET / (count * batch * flops)))


def _distilled(model: nn.Module, x: Tensor, iterations: int, steps: Iterator[int]) -> Tensor:
    """`x` after so many iterations of Adam, which are in float32; in the model's dtype."""
    x, dtype = x.to(device_of(model), torch.float32).requires_grad_(), _dtype_of(model)
    optimizer = torch.optim.Adam([x], _RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    with evaluating(model), torch.enable_grad(), statistics_losses(model) as losses:
        for _ in range(iterations):
            next(steps, None)
            losses.clear()
            run(model, _sample(x.to(dtype)), 0)
            if not losses or not losses[0].requires_grad:
                fact = "the model's forward calls no batch norm, or none with gradients"
                raise UsageError(f"input_shape: {fact}, by which inputs are distilled. Give calib_data.")
            x.grad = torch.autograd.grad(torch.stack(losses).mean(), x)[0]
            optimizer.step()
            schedule.step()
    if not bool(x.isfinite().all()):
        raise NumbersError("batch norms: their statistics lead to inputs that are not finite. Give calib_data.")
    return x.detach().to(dtype)


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next((parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()), torch.float32)


@contextmanager
def statistics_losses(model: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, each call of a batch norm adds to the list how far its input is from its statistics, in deviations."""
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
