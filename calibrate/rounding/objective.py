"""The objective of rounding weights: the error of the layer's output, from sums over its input; no activation is kept.

With w a row of the float weight, v = scale * codes the values of its integers, x the layer's float input and xq the
values of the input's own codes, both summed over all tokens:

    sum (w x - v xq)^2 = sum (w (x - xq))^2  +  d G d - 2 d (C - G) w        d = v - w, G = sum xq xq^T, C = sum xq x^T

The first term is the cost of rounding the input, for any integers. The rest is `error`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..layers.scheme import WEIGHT, QParams, Scheme, dequantize, quantize
from ..layers.weights import QuantizedWeight, finite, round_to_nearest

ROUNDING = 0.01  # damping of the Hessian, relative to its mean diagonal: Frantar et al., GPTQ, 2022
_TARGET = 1.0  # damping of the target weight, relative to the mean diagonal: less overfits a calibration's few prompts
_SCARCE = 10.0  # further damping of the target, times columns / tokens: sums over few tokens err by chance
_PRECISE = 2048  # most columns for which float64 is affordable
_SMALLEST = 2.0**-126  # the smallest normal float32
BLOCK = 64  # columns rounded one by one before the other columns are updated, in one product


@dataclass(frozen=True)
class Inputs:
    """Second-order statistics of a layer's input over `tokens` rows; a convolution's rows are unfolded patches, in *
    height * width.

    `gram` (in, in), float32 or float64: sum of xq xq^T; xq is x where only weights are quantized. `cross` (in, in): sum
    of xq x^T; None means equal to `gram`. In float32 `gram` and `cross` differ by less than their rounding: sum xq (x -
    xq)^T on its own and add that to `gram`.
    """

    gram: Tensor
    cross: Tensor | None
    tokens: int


@dataclass(frozen=True)
class Case:
    """The least squares that every method solves: find codes q with small d H d, where d = q - t, in units of `scale`.

    `target` t (out, in) within the codes of `scheme`; `scale` (out,), from the target's largest value; `hessian` H (in,
    in), positive definite. On the CPU or CUDA, float64 up to 2048 columns, float32 above.
    """

    target: Tensor
    scale: Tensor
    hessian: Tensor
    scheme: Scheme = WEIGHT


def inputs_of(x: Tensor, qparams: QParams | None, scheme: Scheme) -> Inputs:
    """The sums over the rows of `x` (tokens, in), in float64; without `qparams` the input stays float."""
    if qparams is None:
        return Inputs(x.double().T @ x.double(), None, len(x))
    xq = dequantize(quantize(x, qparams, scheme), qparams, scheme).double()
    gram = xq.T @ xq
    return Inputs(gram, gram + xq.T @ (x.double() - xq), len(x))


def rows(tensor: Tensor) -> Tensor:
    """A weight as a matrix (out, in) of float64, on its own device if that is the CPU or CUDA, else on the CPU."""
    device = tensor.device if tensor.device.type in ("cpu", "cuda") else torch.device("cpu")
    return tensor.detach().reshape(tensor.shape[0], -1).to(device).to(torch.float64)


def precision(columns: int) -> torch.dtype:
    """The dtype for computing a case of so many columns."""
    return torch.float64 if columns <= _PRECISE else torch.float32


def error(weight: Tensor, quantized: QuantizedWeight, inputs: Inputs | None) -> Tensor:
    """The integers' share of the squared error of each output channel: float64 (out,), summed over tokens.

    Negative where the integers make up for the rounding of the input. Without inputs, the squared error of the weight
    itself. Costs 4 out in^2 flops.
    """
    w = rows(weight)
    return _above(_values(quantized), w, w, inputs)


def _values(quantized: QuantizedWeight) -> Tensor:
    return rows(quantized.weight) * rows(quantized.scale[:, None])


def _above(v: Tensor, other: Tensor, w: Tensor, inputs: Inputs | None) -> Tensor:
    """The `error` of values `v` (out, in) less the `error` of `other`, as a difference of squares."""
    apart, both = v - other, v + other
    if inputs is None:
        return (apart * (both - 2 * w)).sum(1)
    slope = both @ rows(inputs.gram)
    slope -= 2 * (w @ rows(inputs.gram if inputs.cross is None else inputs.cross).T)
    return (apart * slope).sum(1)


def case_of(weight: Tensor, inputs: Inputs | None, scheme: Scheme = WEIGHT) -> Case:
    """The case of a weight: as target the best float weight for the quantized input, and the metric to round it in.

    The target v minimises sum (w x - v xq)^2 + lambda (v - w)^2, so v = w + w (C - G)^T (G + lambda I)^-1. lambda pulls
    v to the float weight in directions with little input; in directions without any, as with fewer tokens than columns
    or dead columns, v equals the float weight. Costs in^3 / 3 + 4 out in^2 flops.
    """
    w = rows(weight)
    dtype = precision(w.shape[1])
    mean = 0.0 if inputs is None else float(inputs.gram.diagonal().double().mean())
    if inputs is None or mean <= 0.0:
        return _in_units(w.to(dtype), torch.eye(w.shape[1], dtype=dtype, device=w.device), scheme)
    gram = rows(inputs.gram)
    if inputs.cross is not None:
        pull = ((rows(inputs.cross) - gram) / mean).to(dtype)
    gram = (gram / mean).to(dtype)
    if inputs.cross is not None:
        factor = cholesky(damped(gram, _TARGET + _SCARCE * w.shape[1] / max(inputs.tokens, 1)))
        largest = w.abs().amax(1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)  # float32 may not hold the product
        w = w + torch.cholesky_solve(pull @ (w / largest).to(dtype).T, factor).T * largest
    return _in_units(w.to(dtype), damped(gram, ROUNDING), scheme)


def _in_units(target: Tensor, hessian: Tensor, scheme: Scheme) -> Case:
    largest = target.abs().amax(1)
    scale = (largest / scheme.qmax).clamp_min(_SMALLEST)
    scale = torch.where(largest == 0, torch.ones_like(scale), scale).to(torch.float32).to(target.dtype)
    return Case(target / scale[:, None], scale, hessian, scheme)


def form(d: Tensor, hessian: Tensor) -> Tensor:
    """The quadratic form d H d of each row of `d` (out, in): (out,)."""
    return (d @ hessian).mul_(d).sum(1)


def damped(matrix: Tensor, damping: float) -> Tensor:
    """The matrix with `damping` added to its diagonal."""
    made = matrix.clone()
    made.diagonal().add_(damping)
    return made


def cholesky(matrix: Tensor) -> Tensor:
    """The lower factor of a positive matrix, damped more where rounding made the matrix indefinite. in^3 / 3 flops.

    Raises ValueError for a matrix that is not finite.
    """
    damping = 0.0
    while True:
        factor, failed = torch.linalg.cholesky_ex(damped(matrix, damping) if damping else matrix)
        if not int(failed) and finite(factor):
            return factor
        damping = max(10 * damping, 1e-3)
        if damping > 1e6:
            raise ValueError("the second-order statistics of a layer's input are not finite or not positive")


def better(
    weight: Tensor, inputs: Inputs | None, codes: Tensor, scale: Tensor, scheme: Scheme = WEIGHT
) -> QuantizedWeight | None:
    """The channels of `codes` (out, in) and `scale` (out,) whose error is below that of rounding to the nearest.

    All other channels are rounded to the nearest. None where rounding to the nearest gives None. Costs 4 out in^2
    flops.
    """
    nearest = round_to_nearest(weight, scheme=scheme)
    if nearest is None:
        return None
    kept = scale.to(torch.float32).to(nearest.scale.device)
    usable = kept.isfinite() & (kept >= _SMALLEST)
    made = QuantizedWeight(codes.to(nearest.weight.device, nearest.weight.dtype).view_as(nearest.weight), kept)
    above = _above(_values(made), _values(nearest), rows(weight), inputs)
    wins = (above < 0).to(usable.device) & usable
    shape = (-1, *[1] * (weight.ndim - 1))
    return QuantizedWeight(
        torch.where(wins.view(shape), made.weight, nearest.weight), torch.where(wins, made.scale, nearest.scale)
    )


def descend(case: Case, codes: Tensor, low: Tensor, high: Tensor, sweeps: int = 4) -> Tensor:
    """Improves `codes` (out, in) in sweeps that set one column after another to its best value within `low` and `high`.

    No step raises d H d. Costs 4 out in^2 flops a sweep.
    """
    codes, diagonal, columns = codes.clone(), case.hessian.diagonal(), codes.shape[1]
    slope = (codes - case.target) @ case.hessian
    for _ in range(sweeps):
        before = codes.clone()
        for start in range(0, columns, BLOCK):
            stop = min(start + BLOCK, columns)
            old, near = codes[:, start:stop].clone(), slope[:, start:stop].clone()
            for at in range(start, stop):
                best = (codes[:, at] - near[:, at - start] / diagonal[at]).round()
                best = torch.minimum(torch.maximum(best, low[:, at]), high[:, at])
                near += torch.outer(best - codes[:, at], case.hessian[at, start:stop])
                codes[:, at] = best
            slope += (codes[:, start:stop] - old) @ case.hessian[start:stop]
        if torch.equal(before, codes):
            break
    return codes
