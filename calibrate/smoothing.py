"""Smoothing: channels whose values are large are divided before they are rounded, and their weights multiplied.

SmoothQuant (Xiao et al., SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models,
arXiv 2211.10438, 2022): y = W x = (W * s) (x / s) with s[k] = max|x[k]|**alpha / max|W[:, k]|**(1 - alpha).

alpha is searched for each group of layers that share an input, by the error to expect. Rounding errors are uniform
(Widrow, 1956), so with steps d of the input and d[n] of output channel n, the mean squared error of a token's output is

    d**2 / 12 * sum over n, k of (W[n, k] * s[k])**2   +   sum over n of d[n]**2 / 12 * sum over k of E[x[k]**2] / s[k]**2

which costs no forward pass.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .channels import Channels
from .scheme import ACTIVATION, WEIGHT, Scheme

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
WORTH = 0.9  # of the error expected without smoothing: a multiply that saves less is not put in
MOST = 2.0**12  # between the largest factor and the middle one, and the smallest


class Smoothing(NamedTuple):
    """`multiplier` (channels,) in the model's dtype is what the input is multiplied by; `gain` in dB is expected."""

    multiplier: Tensor
    alpha: float
    gain: float


def smoothing_of(
    weights: Sequence[Tensor], inputs: Channels, dtype: torch.dtype, scheme: Scheme = ACTIVATION
) -> Smoothing | None:
    """The smoothing of layers with `weights` (out, in) that are all given the input of these statistics.

    None where it is not expected to be worth a multiply.
    """
    wide = [weight.detach().to(torch.float32) for weight in weights]
    ones = torch.ones_like(inputs.low)
    before = expected_error(wide, inputs, ones, scheme)
    found = [(alpha, stored_multiplier(factors(wide, inputs, alpha), dtype)) for alpha in ALPHAS]
    errors = [expected_error(wide, inputs, multiplier.to(torch.float32), scheme) for _, multiplier in found]
    best = min(range(len(found)), key=errors.__getitem__)
    if before == 0.0 or not errors[best] < WORTH * before:
        return None
    alpha, multiplier = found[best]
    gain = 10 * float(torch.tensor(before / errors[best]).log10())
    return Smoothing(multiplier, alpha, gain)


def factors(weights: Sequence[Tensor], inputs: Channels, alpha: float) -> Tensor:
    """s (in,), float64, its median 1. Channels that are always zero, or have no weights, are 1."""
    largest = torch.maximum(inputs.high, inputs.low.neg()).to(torch.float64)
    weight = torch.stack([each.abs().amax(0) for each in weights]).amax(0).to(torch.float64)
    used = (largest > 0) & (weight > 0)
    if not bool(used.any()):
        return torch.ones_like(largest)
    s = largest.clamp(min=1e-30) ** alpha / weight.clamp(min=1e-30) ** (1 - alpha)
    s = (s / s[used].median()).clamp(1 / MOST, MOST)
    return torch.where(used, s, torch.ones_like(s))


def stored_multiplier(s: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / s as the model's dtype holds it: what the input is multiplied by, so that weights are divided by just that."""
    return (1 / s).to(dtype)


def expected_error(weights: Sequence[Tensor], inputs: Channels, multiplier: Tensor, scheme: Scheme) -> float:
    """The expected squared error of a token's outputs, over their expected square, summed over the layers."""
    low, high = inputs.range(multiplier)
    low, high = min(low, 0.0), max(high, 0.0)
    step = 2 * max(-low, high) / 255 if scheme.symmetric else (high - low) / 255
    squares = inputs.mean_square
    after = float((squares * multiplier.to(torch.float64).square()).sum())
    total = 0.0
    for weight in weights:
        smoothed = weight / multiplier
        signal = float((weight.square().sum(0, dtype=torch.float64) * squares).sum())
        of_input = step**2 / 12 * float(smoothed.square().sum(dtype=torch.float64))
        of_weight = float((smoothed.abs().amax(1) / WEIGHT.qmax).square().sum(dtype=torch.float64)) / 12 * after
        total += (of_input + of_weight) / signal if signal else 0.0
    return total
