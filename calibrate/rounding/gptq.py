"""GPTQ: columns are rounded one after another, and those to come make up for each one's error."""

import torch
from torch import Tensor

from ..scheme import WEIGHT
from ..weights import QuantizedWeight, round_to_nearest
from .objective import BLOCK, Case, Inputs, better, case_of, cholesky


def gptq(weight: Tensor, inputs: Inputs | None, *, iterations: int = 1, seed: int = 0) -> QuantizedWeight | None:
    """Frantar et al., GPTQ: accurate post-training quantization for generative pre-trained transformers, 2022.

    Columns in the order of falling energy of their inputs (act-order), the scale that of the largest value. Without
    inputs there is no error to share, and it rounds to the nearest. Nothing is drawn and nothing iterated: `seed` and
    `iterations` are not used. Costs in^3 / 3 + in^3 / 3 for the factors and 2 out in^2 flops for the columns.
    """
    if inputs is None or round_to_nearest(weight) is None:
        return round_to_nearest(weight)
    case = case_of(weight, inputs)
    return better(weight, inputs, _codes(case), case.scale)


def _codes(case: Case) -> Tensor:
    """The codes (out, in) of a case."""
    order = case.hessian.diagonal().argsort(descending=True, stable=True)
    factor = _shares(case.hessian[order][:, order])
    rest, codes = case.target[:, order], torch.empty_like(case.target)
    columns = rest.shape[1]
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = torch.empty_like(rest[:, start:stop])
        for at in range(start, stop):
            codes[:, order[at]] = code = rest[:, at].round().clamp(WEIGHT.qmin, WEIGHT.qmax)
            errors[:, at - start] = missed = (rest[:, at] - code) / factor[at, at]
            rest[:, at:stop] -= torch.outer(missed, factor[at, at:stop])
        rest[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes


def _shares(hessian: Tensor) -> Tensor:
    """The upper triangular U with U^T U = hessian^-1, without the inverse: hessian = R R^T, R upper, U = R^-1."""
    upper = cholesky(hessian.flip(0, 1)).flip(0, 1)
    return torch.linalg.solve_triangular(
        upper, torch.eye(len(upper), dtype=upper.dtype, device=upper.device), upper=True
    )
