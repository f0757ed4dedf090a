"""EasyQuant: finds the scale of a weight, and that of an activation, at which the layer's output has the greatest
cosine similarity to the float output."""

import torch
from torch import Tensor

from ..layers.inputs import weights_for
from ..layers.scheme import WEIGHT, QParams, Scheme, dequantize, in_float32, quantize, stored_qparams
from ..layers.weights import QuantizedWeight, least_error_scales, round_to_nearest, spread
from .objective import HESSIAN_DAMPING, Inputs, as_matrix, better_channels, damped, inputs_of, precision

_RANGE = (0.5, 1.2)  # smallest and largest scale tried for integers, relative to absmax / 127
_FLOAT_RANGE = (1.0, 2.0)  # for FP8, relative to absmax / 448: twice a scale has the same codes, but for the smallest
_STEPS = 71  # scales tried for a weight: one every 0.01
_ACTIVATION_STEPS = 36  # scales tried for an activation: one every 0.02


def easy_quant(
    weight: Tensor, inputs: Inputs | None, *, scheme: Scheme = WEIGHT, iterations: int = _STEPS
) -> QuantizedWeight | None:
    """Rounds a weight by EasyQuant's weight step.

    Wu et al., EasyQuant: post-training quantization via scale optimization, 2020.

    Tries 71 scales for each output channel, or `iterations` scales if that is less, between 0.5 and 1.2 times the scale
    at which the largest value of the channel becomes the code 127; with FP8 codes between 1 and 2 times the scale at
    which it becomes 448. Each output channel, or with `scheme.per_tensor` the whole weight, takes the scale whose codes
    make its output most similar, by cosine, to the float output. Because the cosine ignores the length of the output,
    this scale is then replaced by the scale at which the same codes have the least squared error.

    `inputs` has sums of products of the layer's inputs. A small number (HESSIAN_DAMPING) is added to their diagonal, as
    in the other methods; otherwise clipping would cost nothing for a weight whose input was near zero in the
    calibration. `scheme` says which codes a weight can have. Without inputs, all inputs count as independent with equal
    energy. If blocks of columns have scales (MXFP8), each block takes the better of two scales instead, by the squared
    error that each column's energy weighs. A scale that other weights share (`scheme.largest`) is left as it is.
    Nothing is random. Costs 2 * out * in^2 flops for each scale tried. Returns None if a channel of the weight is too
    small for a float32 scale.
    """
    nearest = round_to_nearest(weight, scheme=scheme)
    if nearest is None or scheme.largest is not None:
        return nearest
    w = as_matrix(weight)
    gram = torch.eye(w.shape[1], dtype=w.dtype, device=w.device) if inputs is None else as_matrix(inputs.gram)
    if scheme.block is not None:
        scale = least_error_scales(w, scheme, gram.diagonal())
        return better_channels(weight, inputs, scheme.nearest_(w / spread(scale, w)), scale, scheme)
    unit = as_matrix(nearest.scale[:, None])
    w = w / unit
    mean = torch.where((mean := gram.diagonal().mean()) > 0, mean, torch.ones_like(mean))
    pull = torch.zeros_like(w)
    if inputs is not None and inputs.cross is not None:
        pull = w @ ((as_matrix(inputs.cross) - gram) / mean).T
    dtype, steps = precision(w.shape[1]), min(iterations, _STEPS)
    codes, multiple = _best_codes(
        w.to(dtype), damped(gram / mean, HESSIAN_DAMPING).to(dtype), pull.to(dtype), steps, scheme
    )
    return better_channels(weight, inputs, codes, unit[:, 0] * multiple, scheme)


def _best_codes(w: Tensor, gram: Tensor, pull: Tensor, steps: int, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Returns the codes (out, in) whose output is most similar, by cosine, to the float output, and the scales (out,)
    at which these codes have the least squared error. Tries `steps` scales, and for each of them the nearest codes of
    `scheme`. `w` (out, in) is the float weight. Both `w` and the returned scales are in units of the scales of rounding
    to the nearest.

    Let x be a row of the layer's input, as a column vector, and xq the values of its codes. `gram` (in, in) is the sum
    of xq xq^T over all rows, with a small number added to its diagonal. `pull` (out, in) is the sum of w (x - xq) xq^T,
    where w (x - xq) is what the rounding of the input changes in the output. Both sums are divided by the same number.

    At its best scale, the squared error of the output is proportional to 1 - cosine^2, so the codes of the least error
    are those of the greatest cosine. The code sums this error, up to a constant, from the difference between the
    rounded weight and `w`, because 1 - cosine^2 would be the difference of nearly equal numbers.
    """
    weight_gram = w @ gram
    best, scale = scheme.nearest_(w.clone()), torch.ones_like(w[:, 0])
    lowest = torch.full_like(scale, torch.inf)
    extent = _RANGE if scheme.element.integer else _FLOAT_RANGE
    total = _over_all if scheme.per_tensor else _over_columns
    for factor in torch.linspace(*extent, steps, dtype=torch.float64).tolist():
        codes = scheme.nearest_(w / factor)
        v = codes * factor
        d = v - w
        d_gram = d @ gram
        energy = total(v * (weight_gram + d_gram))  # |yq|^2
        missing_length = total(v * (pull - d_gram))  # <y - yq, yq>
        stretch = torch.where(energy > 0, missing_length / energy, torch.zeros_like(missing_length))
        error = total(d * (d_gram - 2 * pull)) - missing_length * stretch
        improves = error < lowest
        lowest = torch.where(improves, error, lowest)
        best = torch.where(improves[:, None], codes, best)
        scale = torch.where(improves, factor * (1 + stretch), scale)
    return best, scale


def _over_columns(x: Tensor) -> Tensor:
    return x.sum(1)


def _over_all(x: Tensor) -> Tensor:
    return x.sum().expand(len(x))


def activation_scale(
    weight: Tensor, quantized: QuantizedWeight, samples: Tensor, qparams: QParams, scheme: Scheme, dtype: torch.dtype
) -> QParams:
    """EasyQuant's activation step: returns the scale and zero point of the input with which the layer's output is most
    similar, by cosine, to the float output.

    `weight` is the float weight, `quantized` its codes and scales. `samples` (tokens, in) float32 are rows of the
    layer's input, and `scheme` is the rule by which they become codes. Tries scales from 0.5 to 1.2 times the scale in
    `qparams`, or from 1 to 2 times for FP8, and returns `qparams` itself unless another scale is better. The scale is a
    value of `dtype`, and a code still stands for exactly 0. Costs 74 * tokens * in * out flops."""
    w = weight.detach().reshape(len(weight), -1).float()
    v = (in_float32(quantized.weight) * quantized.spread_scale).reshape(w.shape)
    exact = samples @ w.T
    best, lowest_error = (
        qparams,
        _dissimilarity(exact, dequantize(quantize(samples, qparams, scheme), qparams, scheme) @ v.T),
    )
    extent = _RANGE if scheme.element.integer else _FLOAT_RANGE
    for factor in torch.linspace(*extent, _ACTIVATION_STEPS, dtype=torch.float64).tolist():
        candidate = _scaled(qparams, factor, scheme, dtype)
        if candidate is None:
            continue
        error = _dissimilarity(exact, dequantize(quantize(samples, candidate, scheme), candidate, scheme) @ v.T)
        if error < lowest_error:
            best, lowest_error = candidate, error
    return best


def easy_quant_pair(
    weight: Tensor,
    samples: Tensor,
    qparams: QParams,
    scheme: Scheme,
    dtype: torch.dtype,
    *,
    alternations: int = 4,
    iterations: int = _STEPS,
) -> tuple[QuantizedWeight, QParams] | None:
    """Runs all of EasyQuant: alternates between the scales of weight and activation until neither changes, at most
    `alternations` times. Returns the rounded weight, and the scale and zero point of the layer's input; None if a
    channel of the weight is too small for a float32 scale.

    `samples` (tokens, in) float32 are rows of the layer's input. `qparams` is the input's scale and zero point at the
    start, `scheme` the rule by which the input becomes codes, and `dtype` the dtype to which the input's scale is
    rounded. `iterations` is the number of weight scales to try, at most 71. Each alternation costs 2 * out * in^2 flops
    for each weight scale and 74 * tokens * in * out flops for the scales of the input.
    """
    quantized: QuantizedWeight | None = None
    for _ in range(max(alternations, 1)):
        before = quantized, qparams
        inputs = inputs_of(samples, qparams, scheme)
        quantized = easy_quant(weight, inputs, scheme=weights_for(scheme), iterations=iterations)
        if quantized is None:
            return None
        qparams = activation_scale(weight, quantized, samples, qparams, scheme, dtype)
        if before[0] is not None and _same(quantized, before[0]) and _same(qparams, before[1]):
            break
    assert quantized is not None
    return quantized, qparams


def _same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _scaled(qparams: QParams, factor: float, scheme: Scheme, dtype: torch.dtype) -> QParams | None:
    """Returns the scale and zero point of an input whose range is `factor` times the range that `qparams` stands for,
    with codes by the rule `scheme`; None if `dtype` cannot hold the scale."""
    scale = factor * float(qparams.scale)
    parameters = stored_qparams(scale, (scheme.qmin - int(qparams.zero_point)) * scale, dtype, scheme)
    return None if parameters is None else QParams(*(tensor.to(qparams.scale.device) for tensor in parameters))


def _dissimilarity(exact: Tensor, output: Tensor) -> float:
    """Returns 1 - cosine^2 of the outputs `exact` and `output`. Computes it from their difference, because the cosine
    itself is 1 up to the last digits."""
    difference = (output - exact).double()
    y, yq = exact.double().flatten(), output.double().flatten()
    difference = difference.flatten()
    energy = float(y @ y)
    if energy == 0.0 or not float(yq @ yq):
        return 1.0
    return (float(difference @ difference) - float(difference @ y) ** 2 / energy) / float(yq @ yq)
