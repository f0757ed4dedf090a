"""AdaRound: learns for each weight whether to round it down or up."""

import math

import torch
from torch import Tensor

from ..layers.scheme import WEIGHT, Scheme
from ..layers.weights import QuantizedWeight, round_to_nearest
from .objective import Case, Inputs, better_channels, case_of, descend, quadratic_form

_RATE = 0.03  # Adam's learning rate
_WEIGHT = 1.0  # weight of the regulariser against the error, whose mean is 1/12 for a weight rounded to the nearest
_WARM = 0.2  # share of the iterations, at the beginning, without the regulariser
_BETA = (20.0, 2.0)  # exponent of the regulariser at the beginning and at the end
_STRETCH, _SHIFT = 1.2, 0.1  # the sigmoid is stretched to -0.1 .. 1.1 and cut at 0 and 1


def adaround(
    weight: Tensor, inputs: Inputs | None, *, scheme: Scheme = WEIGHT, iterations: int = 1000
) -> QuantizedWeight | None:
    """Rounds a weight by AdaRound (Nagel et al., Up or down? Adaptive rounding for post-training quantization, 2020).

    `inputs` has sums of products of the layer's inputs, `iterations` is the number of Adam's steps, and `scheme` says
    which codes a weight can have. Adam minimises the exact error of the layer's output, not an estimate from samples,
    plus a regulariser that forces each value to be rounded either down or up. The scale follows from each output
    channel's largest value. Because the regulariser forces many choices that are not optimal, the learned codes are
    then improved column by column, still only down or up. Without inputs, rounds to the nearest, which is the optimum
    for independent inputs of equal energy. Nothing is random. Costs 2 * out * in^2 flops for each iteration, in
    float32. Returns None if a channel of the weight is too small for a float32 scale.
    """
    if inputs is None or round_to_nearest(weight, scheme=scheme) is None:
        return round_to_nearest(weight, scheme=scheme)
    case = case_of(weight, inputs, scheme)
    low, start = case.target.floor().clamp(scheme.qmin, scheme.qmax - 1), case.target.round()
    codes = descend(case, low + learn_rounding(case, low, iterations), low, low + 1)
    improves = quadratic_form(codes - case.target, case.hessian) < quadratic_form(start - case.target, case.hessian)
    return better_channels(weight, inputs, torch.where(improves[:, None], codes, start), case.scale, scheme)


def learn_rounding(case: Case, low: Tensor, iterations: int) -> Tensor:
    """Learns which values of `case.target`, the weight in units of its scale, to round up. `low` has the values rounded
    down. Returns 0 where the code is to be `low`, and 1 where it is to be `low` + 1. `case.target`, `low` and the
    result are (out, in). `iterations` is the number of Adam's steps."""
    offset, hessian = (low - case.target).float(), (2 * case.hessian).float()
    logits = ((_SHIFT - offset.clamp(-1, 0)) / _STRETCH).logit_()
    optimizer = torch.optim.Adam([logits.requires_grad_()], lr=_RATE)
    with torch.no_grad():
        for iteration in range(iterations):
            sigmoid = logits.sigmoid()
            up = (sigmoid * _STRETCH - _SHIFT).clamp_(0, 1)
            free = (up > 0) & (up < 1)
            if iteration % 50 == 0 and not bool(free.any()):
                break
            slope = (offset + up) @ hessian
            beta = _beta(iteration / iterations)
            if beta is not None:
                centred = 2 * up - 1  # the regulariser is 1 - |centred| ** beta
                slope -= centred.abs().pow_(beta - 1).mul_(centred.sign_()).mul_(2 * beta * _WEIGHT)
            logits.grad = slope.mul_(sigmoid).mul_(1 - sigmoid).mul_(free).mul_(_STRETCH)
            optimizer.step()
        return (logits > 0).to(low.dtype)


def _beta(progress: float) -> float | None:
    """Returns the exponent of AdaRound's regulariser after the share `progress` of the iterations; None while the
    regulariser is off."""
    if progress < _WARM:
        return None
    first, last = _BETA
    return last + (first - last) * (1 + math.cos(math.pi * (progress - _WARM) / (1 - _WARM))) / 2
