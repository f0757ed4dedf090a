"""ADMM: the weight that fits best and the one on the grid are drawn towards each other."""

import torch
from torch import Tensor

from ..scheme import WEIGHT
from ..weights import QuantizedWeight, round_to_nearest
from .objective import Case, Inputs, better, case_of, cholesky, damped, descend, form

_RHO = 0.3  # of the mean diagonal: 0.1 and 1 end higher on most layers
_LOOK = 4  # iterations between two looks at the error, which costs as much as one of them
_PATIENCE = 100  # iterations in which the error has to fall by _GAIN
_GAIN = 0.01


def admm(weight: Tensor, inputs: Inputs | None, *, iterations: int = 1000, seed: int = 0) -> QuantizedWeight | None:
    """Leng et al., Extremely low bit neural network: squeeze the last bit out with ADMM, AAAI 2018.

    The error's quadratic form stands in place of the training loss, so that the step of the float weight has a closed
    form. Keeps each channel's best codes and scale, then descends them column by column. Without inputs it alternates
    codes and scale for the least squared error of the weight. Nothing is drawn: `seed` is not used. Costs
    in^3 for the inverse and 2.5 out in^2 flops an iteration, in float32; stops when 100 iterations gain less than 1 %.
    """
    if round_to_nearest(weight) is None:
        return None
    case = case_of(weight, inputs)
    codes, multiple = _alternated(case, iterations)
    scale = case.scale * multiple
    case = Case(case.target / multiple[:, None], scale, case.hessian)
    most = torch.full_like(codes, WEIGHT.qmax)
    return better(weight, inputs, descend(case, codes, -most, most), scale)


def _alternated(case: Case, iterations: int) -> tuple[Tensor, Tensor]:
    """The best codes (out, in) of each channel, and the multiple (out,) of the case's scale that goes with them."""
    inverse = torch.cholesky_inverse(cholesky(damped(case.hessian, _RHO)))
    pulled, back = (case.target @ case.hessian @ inverse).float(), (_RHO * inverse).float()
    target, hessian = case.target.float(), case.hessian.float()
    codes, multiple, dual = target.round(), torch.ones_like(target[:, 0]), torch.zeros_like(target)
    grid = codes
    best, lowest = (codes, multiple), form(codes - target, hessian)
    earlier = float(lowest.sum())
    for iteration in range(1, iterations + 1):
        aim = pulled + (grid - dual) @ back + dual
        codes = (aim / multiple[:, None]).round_().clamp_(WEIGHT.qmin, WEIGHT.qmax)
        multiple = _fitted(aim, codes, multiple)
        grid = codes * multiple[:, None]
        dual = aim - grid
        if iteration % _LOOK == 0 or iteration == iterations:
            found = form(grid - target, hessian)
            wins = found < lowest
            lowest = torch.where(wins, found, lowest)
            best = torch.where(wins[:, None], codes, best[0]), torch.where(wins, multiple, best[1])
        if iteration % _PATIENCE == 0:
            now = float(lowest.sum())
            if now >= (1 - _GAIN) * earlier:
                break
            earlier = now
    return best[0].to(case.target.dtype), best[1].to(case.target.dtype)


def _fitted(aim: Tensor, codes: Tensor, multiple: Tensor) -> Tensor:
    """The multiples (out,) of the codes that lie nearest to `aim`; the present one for a channel of zeros."""
    energy = codes.square().sum(1)
    return torch.where(energy > 0, (aim * codes).sum(1) / energy.clamp_min(1), multiple)
