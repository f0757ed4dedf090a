"""ADMM: moves the best-fitting float weight and the nearest weight on the grid towards each other, step by step."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..layers.scheme import WEIGHT, Scheme
from ..layers.weights import QuantizedWeight, round_to_nearest
from .objective import Case, Inputs, better_channels, case_of, cholesky, damped, descend, quadratic_form

# rho of each stage, relative to the mean diagonal of the Hessian. The best single rho is between 0.1 and 10, depending
# on the layer; all stages in sequence give a lower error than any single rho.
_STAGES = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)
_LOOK = 4  # iterations between computations of the error; computing it costs as much as an iteration


class _Grid(NamedTuple):
    """A weight on the grid of values that codes can represent. The weight is `codes` (out, in), multiplied in each
    output channel by `multiple` (out,) and by the scale of the least-squares problem, `Case.scale` (out,)."""

    codes: Tensor
    multiple: Tensor

    @property
    def values(self) -> Tensor:
        return self.codes * self.multiple[:, None]


def admm(
    weight: Tensor, inputs: Inputs | None, *, scheme: Scheme = WEIGHT, iterations: int = 1000
) -> QuantizedWeight | None:
    """Rounds a weight by ADMM (Leng et al., Extremely low bit neural network: squeeze the last bit out with ADMM, AAAI
    2018).

    Each iteration first computes the float weight with the least output error plus a penalty for its distance from the
    present codes. Then it takes the codes nearest to this float weight at the present scales, and the best scales for
    these codes. At the end, the codes with the least error of each output channel are improved column by column.

    `inputs` has sums of products of the layer's inputs, from which the output error follows; without them, the error is
    that of the weight itself. `scheme` says which codes a weight can have. Nothing is random. The iterations are
    divided into seven stages with a rising penalty; a stage ends early when its codes stop changing. Costs 7 * in^3
    flops for inverting a matrix in each stage and 2.5 * out * in^2 flops for each iteration, in float32. Returns None
    if a channel of the weight is too small for a float32 scale.
    """
    if round_to_nearest(weight, scheme=scheme) is None:
        return None
    case = case_of(weight, inputs, scheme)
    best = run_stages(case, iterations)
    case = replace(case, target=case.target / best.multiple[:, None], scale=case.scale * best.multiple)
    limit = torch.full_like(best.codes, scheme.qmax)
    return better_channels(weight, inputs, descend(case, best.codes, -limit, limit), case.scale, scheme)


def run_stages(case: Case, iterations: int) -> _Grid:
    """Solves the least-squares problem `case` by ADMM in seven stages with a rising penalty, which have about
    `iterations` iterations in all. Returns, for each output channel, the codes with the least error, and the factor by
    which `case.scale` is multiplied for them."""
    target, hessian, slope = case.target.float(), case.hessian.float(), case.target @ case.hessian
    best = grid = _Grid(target.round(), torch.ones_like(target[:, 0]))
    lowest = torch.full_like(grid.multiple, torch.inf)
    dual = torch.zeros_like(target)  # the dual variable over rho: it shrinks as rho rises
    iterations_per_stage = -(-iterations // len(_STAGES))
    for rho in _STAGES:
        inverse = torch.cholesky_inverse(cholesky(damped(case.hessian, rho)))
        pull, feedback = (slope @ inverse).float(), (rho * inverse).float()
        dual = dual / 2
        previous = grid.codes
        for iteration in range(1, iterations_per_stage + 1):
            aim = pull + (grid.values - dual) @ feedback + dual
            grid = _project(aim, grid.multiple, case.scheme)
            dual = aim - grid.values
            if iteration % _LOOK and iteration < iterations_per_stage:
                continue
            errors = quadratic_form(grid.values - target, hessian)
            improves = errors < lowest
            lowest = torch.where(improves, errors, lowest)
            best = _Grid(
                torch.where(improves[:, None], grid.codes, best.codes),
                torch.where(improves, grid.multiple, best.multiple),
            )
            if torch.equal(grid.codes, previous):
                break
            previous = grid.codes
    return _Grid(*(tensor.to(case.target.dtype) for tensor in best))


def _project(aim: Tensor, multiple: Tensor, scheme: Scheme) -> _Grid:
    """Returns the codes of `scheme` nearest to `aim` / `multiple`, with the best new multiples for these codes. `aim`
    (out, in) is the float weight to approach, and `multiple` (out,) the present multiples, both in units of
    `Case.scale`. A channel whose codes are all zero keeps its multiple."""
    codes = scheme.nearest_(aim / multiple[:, None])
    energy = codes.square().sum(1)
    return _Grid(codes, torch.where(energy > 0, (aim * codes).sum(1) / energy.clamp_min(1), multiple))
