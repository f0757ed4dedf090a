"""EasyQuant: finds the scale at which the layer's output is most similar, by cosine, to the float output."""

import torch
from torch import Tensor

from ..layers.scheme import WEIGHT, QParams, Scheme, dequantize, quantize, stored_qparams
from ..layers.weights import QuantizedWeight, round_to_nearest
from .objective import ROUNDING, Inputs, better, damped, inputs_of, precision, rows

_RANGE = (0.5, 1.2)  # the scales tried, relative to absmax / 127
_STEPS = 71  # scales tried for a weight: a hundredth apart
_ACTIVATION_STEPS = 36  # scales tried for an activation: two hundredths apart


def easy_quant(
    weight: Tensor, inputs: Inputs | None, *, scheme: Scheme = WEIGHT, iterations: int = _STEPS
) -> QuantizedWeight | None:
    """Rounds by EasyQuant's step of the weight.

    Wu et al., EasyQuant: post-training quantization via scale optimization, 2020.

    Of 71 scales between 0.5 and 1.2 times absmax / 127, or `iterations` if that is less, each channel takes the scale
    whose codes make its output the most similar, by cosine, to the float output. The cosine ignores lengths, so the
    scale is then replaced by the one at which these codes have the least squared error. The sums are damped as for the
    other methods: else clipping a weight whose input was near zero in the calibration would cost nothing. Unknown
    inputs count as alike and independent. Nothing is random. Costs 2 out in^2 flops a scale.
    """
    nearest = round_to_nearest(weight, scheme=scheme)
    if nearest is None:
        return None
    unit = rows(nearest.scale[:, None])
    w = rows(weight) / unit
    gram = torch.eye(w.shape[1], dtype=w.dtype, device=w.device) if inputs is None else rows(inputs.gram)
    mean = gram.diagonal().mean()
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    pull = torch.zeros_like(w)
    if inputs is not None and inputs.cross is not None:
        pull = w @ ((rows(inputs.cross) - gram) / mean).T
    dtype = precision(w.shape[1])
    steps = min(iterations, _STEPS)
    codes, multiple = _searched(w.to(dtype), damped(gram / mean, ROUNDING).to(dtype), pull.to(dtype), steps, scheme)
    return better(weight, inputs, codes, unit[:, 0] * multiple, scheme)


def _searched(w: Tensor, gram: Tensor, pull: Tensor, steps: int, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """The codes (out, in) of greatest cosine and the best scales (out,) for them; `pull` (out, in) is (C - G) w.

    With the best length of v the squared error is |y|^2 (1 - cos^2): least where the cosine is greatest, and computed
    without the cosine's difference of nearly equal numbers.
    """
    whole = w @ gram
    best, scale = w.round(), torch.ones_like(w[:, 0])
    lowest = torch.full_like(scale, torch.inf)
    for factor in torch.linspace(*_RANGE, steps, dtype=torch.float64).tolist():
        codes = scheme.nearest_(w / factor)
        v = codes * factor
        d = v - w
        moved = d @ gram
        energy = (v * (whole + moved)).sum(1)  # |yq|^2
        along = (v * (pull - moved)).sum(1)  # <y - yq, yq>
        longer = torch.where(energy > 0, along / energy, torch.zeros_like(along))
        error = (d * (moved - 2 * pull)).sum(1) - along * longer
        wins = error < lowest
        lowest = torch.where(wins, error, lowest)
        best = torch.where(wins[:, None], codes, best)
        scale = torch.where(wins, factor * (1 + longer), scale)
    return best, scale


def activation_scale(
    weight: Tensor, quantized: QuantizedWeight, samples: Tensor, qparams: QParams, scheme: Scheme, dtype: torch.dtype
) -> QParams:
    """The activation step of EasyQuant: picks the scale, 0.5 to 1.2 times the present one, of the most similar output.

    `samples` (tokens, in) float32 are rows of the layer's input; `qparams`, the present parameters, are kept unless
    another scale is better. The scale is a value of `dtype`, and zero stays exact. Costs 74 tokens in out flops.
    """
    w = weight.detach().reshape(len(weight), -1).float()
    v = quantized.weight.reshape(w.shape).float() * quantized.scale[:, None]
    exact = samples @ w.T
    best, lowest = qparams, _sine(exact, dequantize(quantize(samples, qparams, scheme), qparams, scheme) @ v.T)
    for factor in torch.linspace(*_RANGE, _ACTIVATION_STEPS, dtype=torch.float64).tolist():
        tried = _scaled(qparams, factor, scheme, dtype)
        if tried is None:
            continue
        found = _sine(exact, dequantize(quantize(samples, tried, scheme), tried, scheme) @ v.T)
        if found < lowest:
            best, lowest = tried, found
    return best


def easy_quant_pair(
    weight: Tensor,
    samples: Tensor,
    qparams: QParams,
    scheme: Scheme,
    dtype: torch.dtype,
    *,
    turns: int = 4,
    iterations: int = _STEPS,
) -> tuple[QuantizedWeight, QParams] | None:
    """The whole of EasyQuant: weight and activation scales alternately until neither changes, at most `turns` times.

    Takes the arguments of `activation_scale`, and `iterations` of `easy_quant`; None where `easy_quant` gives None.
    Costs both functions each time.
    """
    made: QuantizedWeight | None = None
    for _ in range(max(turns, 1)):
        before = made, qparams
        made = easy_quant(weight, inputs_of(samples, qparams, scheme), iterations=iterations)
        if made is None:
            return None
        qparams = activation_scale(weight, made, samples, qparams, scheme, dtype)
        if before[0] is not None and _same(made, before[0]) and _same(qparams, before[1]):
            break
    assert made is not None
    return made, qparams


def _same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _scaled(qparams: QParams, factor: float, scheme: Scheme, dtype: torch.dtype) -> QParams | None:
    """The parameters for `factor` times the present range; None where `dtype` holds no such scale."""
    wanted = factor * float(qparams.scale)
    found = stored_qparams(wanted, (scheme.qmin - int(qparams.zero_point)) * wanted, dtype, scheme)
    return None if found is None else QParams(*(each.to(qparams.scale.device) for each in found))


def _sine(exact: Tensor, found: Tensor) -> float:
    """1 - cosine^2 of two outputs, computed from their difference, since the cosine is 1 up to the last digits."""
    missed = (found - exact).double()
    y, yq = exact.double().flatten(), found.double().flatten()
    missed = missed.flatten()
    energy = float(y @ y)
    if energy == 0.0 or not float(yq @ yq):
        return 1.0
    return (float(missed @ missed) - float(missed @ y) ** 2 / energy) / float(yq @ yq)
