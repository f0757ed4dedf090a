"""The objective of rounding weights: the error of the layer's output, computed from sums over its input, without stored
activations.

Let w be a row of the float weight, and v = scale * codes the row that its codes stand for. Let x be the layer's float
input for one token, a column, and xq the values that the codes of this input stand for. Each sum runs over all tokens:

    sum (w x - v xq)^2 = sum (w (x - xq))^2  +  d G d^T - 2 d (C - G) w^T     d = v - w, G = sum xq xq^T, C = sum xq x^T

The first term on the right is the cost of quantizing the input; it does not depend on v. The rest is what `error`
returns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..layers.scheme import WEIGHT, QParams, Scheme, dequantize, in_float32, quantize
from ..layers.weights import QuantizedWeight, finite, least_error_scales, round_to_nearest, spread

HESSIAN_DAMPING = 0.01  # damping of the Hessian, relative to its mean diagonal (Frantar et al., GPTQ, 2022)
_TARGET_DAMPING = 1.0  # damping of the target, relative to the mean diagonal: less overfits to the few prompts
_SCARCITY_DAMPING = 10.0  # added damping of the target, times columns / tokens: sums over few tokens err by chance
_PRECISE = 2048  # most columns for which float64 is used: above, it takes too long
_SMALLEST = 2.0**-126  # the smallest normal float32
BLOCK = 64  # columns that are rounded one by one before one product updates all other columns


@dataclass(frozen=True)
class Inputs:
    """Second-order statistics of a layer's input over `tokens` rows; a convolution's rows are unfolded patches, (in *
    height * width,).

    Let x be a row of the float input, as a column vector, and xq the values of its codes (x itself if only weights are
    quantized). `gram` (in, in), float32 or float64, is the sum of xq xq^T, and `cross` (in, in) is the sum of xq x^T.
    If `cross` is None, it equals `gram`. Do not sum `cross` directly in float32: its difference from `gram` would be
    below the rounding error. Sum xq (x - xq)^T instead and add the sum to `gram`.

    For a convolution with g > 1 groups, x is the part of a patch that one group reads, and there is a pair of sums for
    each group: `gram` and `cross` are (g, in, in), where `in` is the number of columns of the weight.
    """

    gram: Tensor
    cross: Tensor | None
    tokens: int

    @property
    def groups(self) -> int:
        """The number of groups of the convolution; 1 for a linear layer."""
        return len(self.gram) if self.gram.ndim == 3 else 1


@dataclass(frozen=True)
class Case:
    """The least-squares problem that every rounding method solves for a weight: find codes q for which the error d H
    d^T of each output channel is small, where d is the channel's row of (q - t).

    `target` t (out, in) is the float weight to round, in units of `scale`, within the range of the codes of `scheme`.
    `scale` (out,) follows from the target's largest value; with `scheme.per_tensor` from that of the whole target.
    `hessian` H (in, in) is positive definite. The tensors are on the CPU or CUDA: float64 up to 2048 columns, float32
    above.

    For a convolution with g > 1 groups there is such a problem for each group: `target` is (g, out / g, in), `scale`
    (g, out / g) and `hessian` (g, in, in).

    If blocks of columns have scales (MXFP8), these are `scale` (out, blocks), and `target` is the float weight itself:
    a code stands for `steps` times itself, with `steps` (out, in). Otherwise `steps` is None, for 1.
    """

    target: Tensor
    scale: Tensor
    hessian: Tensor
    scheme: Scheme = WEIGHT
    steps: Tensor | None = None


def inputs_of(x: Tensor, qparams: QParams | None, scheme: Scheme) -> Inputs:
    """Returns second-order statistics of the rows of `x` (tokens, in), in float64. `qparams` and `scheme` say how the
    input becomes codes; without `qparams` it stays float."""
    if qparams is None:
        return Inputs(x.double().T @ x.double(), None, len(x))
    xq = dequantize(quantize(x, qparams, scheme), qparams, scheme).double()
    gram = xq.T @ xq
    return Inputs(gram, gram + xq.T @ (x.double() - xq), len(x))


def as_matrix(tensor: Tensor, groups: int = 1) -> Tensor:
    """Returns a weight as a float64 matrix (out, in), or as one for each group (groups, out / groups, in) if it has
    several, on its own device if that is the CPU or CUDA, else on the CPU."""
    shape = (tensor.shape[0],) if groups == 1 else (groups, tensor.shape[0] // groups)
    return _in_float64(tensor.reshape(*shape, -1))


def _in_float64(tensor: Tensor) -> Tensor:
    device = tensor.device if tensor.device.type in ("cpu", "cuda") else torch.device("cpu")
    return tensor.detach().to(device).to(torch.float64)


def precision(columns: int) -> torch.dtype:
    """Returns the dtype in which a weight with `columns` columns (input channels) is rounded: float64 up to 2048, else
    float32."""
    return torch.float64 if columns <= _PRECISE else torch.float32


def error(weight: Tensor, quantized: QuantizedWeight, inputs: Inputs | None) -> Tensor:
    """Returns the part of each output channel's squared error that depends on the codes of `quantized`, the rounded
    `weight`: float64 (out,), summed over tokens.

    The part is negative where these codes compensate the rounding of the input. Without inputs, returns the squared
    error of the weight itself. Costs 4 * out * in^2 flops.
    """
    w = as_matrix(weight)
    return _error_difference(_values(quantized), w, w, inputs)


def _values(quantized: QuantizedWeight) -> Tensor:
    weight = as_matrix(in_float32(quantized.weight))
    return weight.mul_(spread(quantized.scale.to(weight.device), weight))


def _error_difference(v: Tensor, other: Tensor, w: Tensor, inputs: Inputs | None) -> Tensor:
    """Returns by how much the output error (see `error`) of each output channel, (out,), is larger with the quantized
    weight `v` than with the quantized weight `other`; `w` is the float weight. All three are (out, in). `inputs` has
    sums of products of the layer's inputs. Computes the difference as a product, because the two errors may be nearly
    equal."""
    if inputs is not None and inputs.groups > 1:
        v, other, w = (as_matrix(tensor, inputs.groups) for tensor in (v, other, w))
    difference, total = v - other, v + other
    if inputs is None:
        return (difference * (total - 2 * w)).sum(1)
    slope = total @ _in_float64(inputs.gram)
    slope -= 2 * (w @ _in_float64(inputs.gram if inputs.cross is None else inputs.cross).mT)
    return (difference * slope).sum(-1).flatten()


def case_of(weight: Tensor, inputs: Inputs | None, scheme: Scheme = WEIGHT) -> Case:
    """Returns the least-squares problem of rounding a weight. `scheme` says which codes a weight can have.

    Let w be the float weight, x the layer's input and xq the values of its codes, G = sum xq xq^T and C = sum xq x^T.
    The target of the problem is the float weight v that gives the best output when the input is quantized: it minimises
    sum (w x - v xq)^2 + lambda (v - w)^2, where lambda is a small number. So v = w + w (C - G)^T (G + lambda I)^-1. In
    directions with little input, lambda pulls v towards w. In directions without input, which occur with dead columns
    or with fewer tokens than columns, v equals w. Each output channel of the target is divided by a scale, which
    follows from the channel's largest value.

    The Hessian of the problem is G, divided by the mean of its diagonal, with damping. Without inputs, the target comes
    from the weight itself, and the Hessian is the identity. Costs in^3 / 3 + 4 * out * in^2 flops.
    """
    w = as_matrix(weight, 1 if inputs is None else inputs.groups)
    columns = w.shape[-1]
    dtype = precision(columns)
    if inputs is None:
        return _case_with_scale(w.to(dtype), torch.eye(columns, dtype=dtype, device=w.device), scheme)
    gram = _in_float64(inputs.gram)
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    mean = torch.where(mean > 0, mean, 1.0)  # without any input, the Hessian is a multiple of the identity
    if inputs.cross is not None:
        pull = ((_in_float64(inputs.cross) - gram) / mean).to(dtype)
    gram = (gram / mean).to(dtype)
    if inputs.cross is not None:
        factor = cholesky(damped(gram, _TARGET_DAMPING + _SCARCITY_DAMPING * columns / max(inputs.tokens, 1)))
        largest = w.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)  # float32 may not hold the product
        w = w + torch.cholesky_solve(pull @ (w / largest).to(dtype).mT, factor).mT * largest
    return _case_with_scale(w.to(dtype), damped(gram, HESSIAN_DAMPING), scheme)


def _case_with_scale(target: Tensor, hessian: Tensor, scheme: Scheme) -> Case:
    """Returns the least-squares problem with the Hessian `hessian`, for rounding the float weight `target`. The scale
    of an output channel is the channel's largest magnitude divided by the largest code of `scheme`, and the problem's
    target is `target` divided by this scale."""
    if scheme.block is not None:
        scale = least_error_scales(target, scheme, hessian.diagonal())
        return Case(target, scale, hessian, scheme, spread(scale, target).to(target.dtype))
    largest = target.abs().amax(-1)
    if scheme.per_tensor:
        whole = largest.amax() if scheme.largest is None else largest.new_tensor(scheme.largest)
        largest = whole.expand_as(largest)
    scale = (largest / scheme.qmax).clamp_min(_SMALLEST)
    scale = torch.where(largest == 0, torch.ones_like(scale), scale).to(torch.float32).to(target.dtype)
    return Case(target / scale[..., None], scale, hessian, scheme)


def quadratic_form(d: Tensor, hessian: Tensor) -> Tensor:
    """Returns d H d^T for each row d of `d` (out, in), with H the matrix `hessian` (in, in): a tensor (out,)."""
    return (d @ hessian).mul_(d).sum(1)


def damped(matrix: Tensor, damping: float) -> Tensor:
    """Returns the matrix, or each of a batch of matrices (..., n, n), with `damping` added to its diagonal."""
    result = matrix.clone()
    result.diagonal(dim1=-2, dim2=-1).add_(damping)
    return result


def cholesky(matrix: Tensor) -> Tensor:
    """Returns the lower Cholesky factor of a positive definite matrix, or the factors of a batch of them (..., n, n).
    Adds damping where rounding made a matrix indefinite. Costs n^3 / 3 flops.

    Raises ValueError for a matrix that contains NaN or infinities, or that is far from positive definite.
    """
    damping = 0.0
    while True:
        factor, failed = torch.linalg.cholesky_ex(damped(matrix, damping) if damping else matrix)
        if not failed.any() and finite(factor):
            return factor
        damping = max(10 * damping, 1e-3)
        if damping > 1e6:
            raise ValueError(
                "the sum of x x^T over the rows x of a layer's input has NaN or Inf, or is not positive definite"
            )


def better_channels(
    weight: Tensor, inputs: Inputs | None, codes: Tensor, scale: Tensor, scheme: Scheme = WEIGHT
) -> QuantizedWeight | None:
    """Returns a quantized weight, rounded to the nearest except in the output channels where `codes` (out, in) and
    `scale`, (out,) or (out, blocks), give a smaller error. These channels have `codes` and `scale`. With
    `scheme.per_tensor`, a weight has one scale, so either all channels take `codes` and `scale` or none does; unless
    `scheme.largest` is set, with which both have the same scale anyway.

    `inputs` has sums of products of the layer's inputs, from which the errors follow; `scheme` says which codes a
    weight can have. Returns None if a channel of the weight is too small for a float32 scale. Costs 4 * out * in^2
    flops.
    """
    nearest = round_to_nearest(weight, scheme=scheme)
    if nearest is None:
        return None
    new_scale = scale.to(torch.float32).to(nearest.scale.device).view_as(nearest.scale)
    usable = (new_scale.isfinite() & (new_scale >= _SMALLEST)).view(len(new_scale), -1).all(1)
    candidate = QuantizedWeight(
        codes.to(nearest.weight.device, nearest.weight.dtype).view_as(nearest.weight), new_scale
    )
    difference = _error_difference(_values(candidate), _values(nearest), as_matrix(weight), inputs)
    improves = (difference < 0).to(usable.device) & usable
    if scheme.per_tensor and scheme.largest is None:
        improves = ((difference.sum() < 0).to(usable.device) & usable.all()).expand_as(usable)
    return QuantizedWeight(
        torch.where(spread(improves, nearest.weight), candidate.weight, nearest.weight),
        torch.where(spread(improves, nearest.scale), candidate.scale, nearest.scale),
    )


def descend(case: Case, codes: Tensor, low: Tensor, high: Tensor, sweeps: int = 4) -> Tensor:
    """Returns better codes of a layer's weight than `codes` (out, in), by coordinate descent.

    There are at most `sweeps` sweeps, each of which changes one column after another. A column gets the codes with the
    smallest error, while all other columns stay as they are. The codes stay between `low` and `high`, both (out, in).
    The error of an output channel is d H d^T, where d is the channel's row of (codes - case.target), and H is
    case.hessian. No step makes the error larger. A sweep costs 4 * out * in^2 flops.
    """
    codes, diagonal, columns = codes.clone(), case.hessian.diagonal(), codes.shape[1]
    slope = (codes - case.target) @ case.hessian
    for _ in range(sweeps):
        before = codes.clone()
        for start in range(0, columns, BLOCK):
            stop = min(start + BLOCK, columns)
            former, local_slope = codes[:, start:stop].clone(), slope[:, start:stop].clone()
            for column in range(start, stop):
                best = (codes[:, column] - local_slope[:, column - start] / diagonal[column]).round()
                best = torch.minimum(torch.maximum(best, low[:, column]), high[:, column])
                local_slope += torch.outer(best - codes[:, column], case.hessian[column, start:stop])
                codes[:, column] = best
            slope += (codes[:, start:stop] - former) @ case.hessian[start:stop]
        if torch.equal(before, codes):
            break
    return codes
