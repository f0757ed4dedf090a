"""GPTQ: rounds columns one after another, and lets the remaining columns make up for the error of each."""

import torch
from torch import Tensor

from ..layers.scheme import WEIGHT, Scheme
from ..layers.weights import QuantizedWeight, round_to_nearest
from .objective import BLOCK, Case, Inputs, better, case_of, cholesky


def gptq(
    weight: Tensor, inputs: Inputs | None, *, scheme: Scheme = WEIGHT, iterations: int = 1
) -> QuantizedWeight | None:
    """Rounds by GPTQ.

    Frantar et al., GPTQ: accurate post-training quantization for generative pre-trained transformers, 2022.

    Takes columns in the order of falling energy of their inputs (act-order), at the scale of the largest value. Without
    inputs there is no error to share, and GPTQ rounds to the nearest. Nothing is random or iterated: `iterations` is
    not used. Costs in^3 / 3 for the factor and out in^2 flops for the columns.
    """
    if inputs is None or round_to_nearest(weight, scheme=scheme) is None:
        return round_to_nearest(weight, scheme=scheme)
    case = case_of(weight, inputs, scheme)
    return better(weight, inputs, _codes(case), case.scale, scheme)


def _codes(case: Case) -> Tensor:
    """The codes (out, in) of a case.

    Uses the factor of the Hessian, not of its inverse (Chen et al., The Geometry of LLM Quantization: GPTQ as Babai's
    Nearest Plane Algorithm, 2025): with H = R R^T, R upper, d H d is a sum of squares, one for each column, of that
    column and the columns before it. So the squares are made small one by one.
    """
    order = case.hessian.diagonal().argsort(descending=True, stable=True)
    factor = cholesky(case.hessian[order][:, order].flip(0, 1)).flip(0, 1)
    shares = factor.div_(factor.diagonal().clone())
    target, codes = case.target[:, order], torch.empty_like(case.target)
    rest, columns = target.clone(), target.shape[1]
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        near, missed = rest[:, start:stop].clone(), torch.empty_like(rest[:, start:stop])
        for at in range(stop - start):
            codes[:, order[start + at]] = code = case.scheme.nearest_(near[:, at].clone())
            missed[:, at] = code - target[:, start + at]
            near -= torch.outer(missed[:, at], shares[start + at, start:stop])
        rest[:, stop:] -= missed @ shares[start:stop, stop:]
    return codes
