"""ADMM: draws the float weight that fits best and the weight on the grid towards each other."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..layers.scheme import WEIGHT, Scheme
from ..layers.weights import QuantizedWeight, round_to_nearest
from .objective import Case, Inputs, better, case_of, cholesky, damped, descend, form

# rho of each stage, relative to the mean diagonal of the Hessian. The best single rho lies between 0.1 and 10, by
# layer; the stages one after another end with a lower error than any single rho.
_STAGES = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)
_LOOK = 4  # iterations between two computations of the error, each of which costs as much as an iteration


class _Grid(NamedTuple):
    """Codes (out, in) and the multiple (out,) of the case's scale that goes with them."""

    codes: Tensor
    multiple: Tensor

    @property
    def values(self) -> Tensor:
        return self.codes * self.multiple[:, None]


def admm(
    weight: Tensor, inputs: Inputs | None, *, scheme: Scheme = WEIGHT, iterations: int = 1000
) -> QuantizedWeight | None:
    """Rounds by ADMM (Leng et al., Extremely low bit neural network: squeeze the last bit out with ADMM, AAAI 2018).

    The error's quadratic form replaces the training loss, so that the step of the float weight has a closed form; codes
    and scale are projected alternately. The best codes of each channel are then improved column by column. Without
    inputs the form is the squared error of the weight. Nothing is random. Costs 7 in^3 for the factors and 2.5 out in^2
    flops an iteration, in float32; a stage ends early when its codes no longer change.
    """
    if round_to_nearest(weight, scheme=scheme) is None:
        return None
    case = case_of(weight, inputs, scheme)
    best = alternated(case, iterations)
    case = replace(case, target=case.target / best.multiple[:, None], scale=case.scale * best.multiple)
    most = torch.full_like(best.codes, scheme.qmax)
    return better(weight, inputs, descend(case, best.codes, -most, most), case.scale, scheme)


def alternated(case: Case, iterations: int) -> _Grid:
    """Runs all stages; returns the best codes and multiple of each channel."""
    target, hessian, slope = case.target.float(), case.hessian.float(), case.target @ case.hessian
    best = grid = _Grid(target.round(), torch.ones_like(target[:, 0]))
    lowest = torch.full_like(grid.multiple, torch.inf)
    dual = torch.zeros_like(target)  # the dual variable over rho: it shrinks as rho rises
    last = -(-iterations // len(_STAGES))
    for rho in _STAGES:
        inverse = torch.cholesky_inverse(cholesky(damped(case.hessian, rho)))
        pulled, back = (slope @ inverse).float(), (rho * inverse).float()
        dual = dual / 2
        seen = grid.codes
        for iteration in range(1, last + 1):
            aim = pulled + (grid.values - dual) @ back + dual
            grid = _projected(aim, grid.multiple, case.scheme)
            dual = aim - grid.values
            if iteration % _LOOK and iteration < last:
                continue
            found = form(grid.values - target, hessian)
            wins = found < lowest
            lowest = torch.where(wins, found, lowest)
            best = _Grid(
                torch.where(wins[:, None], grid.codes, best.codes), torch.where(wins, grid.multiple, best.multiple)
            )
            if torch.equal(grid.codes, seen):
                break
            seen = grid.codes
    return _Grid(*(each.to(case.target.dtype) for each in best))


def _projected(aim: Tensor, multiple: Tensor, scheme: Scheme) -> _Grid:
    """The codes nearest to `aim` (out, in) at this scale, then the best scale for these codes; a channel of zero codes
    keeps its scale."""
    codes = scheme.nearest_(aim / multiple[:, None])
    energy = codes.square().sum(1)
    return _Grid(codes, torch.where(energy > 0, (aim * codes).sum(1) / energy.clamp_min(1), multiple))
