"""GPTQ: rounds one column of the weight after another, and lets the columns not yet rounded compensate the error."""

import torch
from torch import Tensor

from ..layers.scheme import WEIGHT, Scheme
from ..layers.weights import QuantizedWeight, round_to_nearest
from .objective import BLOCK, Case, Inputs, better_channels, case_of, cholesky


def gptq(
    weight: Tensor, inputs: Inputs | None, *, scheme: Scheme = WEIGHT, iterations: int = 1
) -> QuantizedWeight | None:
    """Rounds a weight by GPTQ.

    Frantar et al., GPTQ: accurate post-training quantization for generative pre-trained transformers, 2022.

    `inputs` has sums of products of the layer's inputs; `scheme` says which codes a weight can have. Rounds the columns
    in descending order of the energy of their inputs (act-order), with the scale that follows from each output
    channel's largest value. Without inputs, rounds to the nearest. Nothing is random. GPTQ does not iterate, so it
    ignores `iterations`. Costs in^3 / 3 flops for the Cholesky factor and out * in^2 flops for the columns. Returns
    None if a channel of the weight is too small for a float32 scale.
    """
    if inputs is None or round_to_nearest(weight, scheme=scheme) is None:
        return round_to_nearest(weight, scheme=scheme)
    case = case_of(weight, inputs, scheme)
    return better_channels(weight, inputs, _codes(case), case.scale, scheme)


def _codes(case: Case) -> Tensor:
    """Returns the codes that GPTQ finds for the least-squares problem `case`, with the float target t and the Hessian
    H, in the shape of t.

    Uses the factor of the Hessian, not that of its inverse (Chen et al., The Geometry of LLM Quantization: GPTQ as
    Babai's Nearest Plane Algorithm, 2025). The error of an output channel is d H d^T, where d is the channel's row of
    (codes - t). With H = R R^T and R upper triangular, the error is the sum of the squares of d R. Each of these
    squares belongs to one column, and depends only on the codes of that column and of the columns before it. So the
    squares are minimised one by one.
    """
    order = case.hessian.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
    in_order = torch.take_along_dim(torch.take_along_dim(case.hessian, order[..., None], -2), order[..., None, :], -1)
    factor = cholesky(in_order.flip(-2, -1)).flip(-2, -1)
    shares = factor.div_(factor.diagonal(dim1=-2, dim2=-1).clone()[..., None, :])
    target = torch.take_along_dim(case.target, order[..., None, :], -1)
    steps = None if case.steps is None else case.steps[:, order]
    rest, codes, columns = target.clone(), torch.empty_like(target), target.shape[-1]
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        block, errors = rest[..., start:stop].clone(), torch.empty_like(rest[..., start:stop])
        for index in range(stop - start):
            step = 1.0 if steps is None else steps[:, start + index]
            codes[..., start + index] = code = case.scheme.nearest_(block[..., index] / step)
            errors[..., index] = code * step - target[..., start + index]
            block -= errors[..., index, None] * shares[..., start + index, None, start:stop]
        rest[..., stop:] -= errors @ shares[..., start:stop, stop:]
    return codes.scatter(-1, order[..., None, :].expand_as(codes), codes)
