"""Chooses weights and biases that compensate the rounding error in the layer's output; held-out calls judge them.

Let x be an input row of a layer, as a column vector, and W the float weight. Let xq and Wq be the values that their
codes stand for. A replay (a run of the float model on recorded calls) sums xq xq^T and xq (x - xq)^T, for as many
layers at once as memory allows. The rounding methods choose the codes of the weights from these sums. The correction of
the bias is the mean of W x - Wq xq over the same calls (Nagel et al., Data-Free Quantization Through Weight
Equalization and Bias Correction, arXiv 1906.04721, 2019). A layer for which no result is better than rounding to the
nearest keeps rounding to the nearest.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ..choice import Choice
from ..layers.inputs import FloatInput, StaticInput
from ..layers.scheme import in_float32
from ..layers.transforms import weight_for
from ..layers.weights import round_to_nearest
from ..observers.patches import PatchSurvey
from ..observers.survey import Survey
from ..plan import FloatLayer, groups_of, layer_at
from ..replay.calls import Calls
from ..replay.current_call import CurrentCall
from ..replay.hooks import observe
from ..replay.work import Work
from .easy_quant import easy_quant_pair
from .judge import error_of
from .methods import WEIGHT_METHODS, Method
from .sums import SUMS_BYTES, Sums, batches_of, layers_by_input, sums_for

_MAX_CLIPPED_ERROR = 0.3  # EasyQuant's scales clip, which harms the model: they have to lower the error by 70 %
_MIN_REACH = 0.5  # share of the extremes that sampled rows have to reach: smaller rows do not show the cost of clipping


def choose_weights(
    model: nn.Module,
    choices: Mapping[str, Choice],
    surveys: Mapping[str, Survey],
    calls: Calls,
    method: Method,
    work: Work,
    sums_bytes: float = SUMS_BYTES,
) -> dict[str, Choice]:
    """Returns a changed copy of `choices`, a dict from layer name to how the layer is quantized. A layer gets codes and
    a bias correction that `method` computes, if they lower the layer's output error on the held-out rows in `surveys`.

    `calls` are calls that are not held out. The model replays them once for each batch of layers; the sums that a batch
    needs fit in `sums_bytes` bytes. The result is the same for any `sums_bytes`. Collective: the ranks of `work` share
    the layers. Each rank replays all calls, so that sums are added in the same order on any rank.
    """
    chosen: dict[str, Choice] = {}
    batches = list(batches_of(layers_by_input(choices, surveys, work.ranks), surveys, method, sums_bytes))
    count = sum(len(members) for batch in batches for members in batch)
    progress = iter(work.progress("weights", range(count), count))
    for batch in batches:
        current = CurrentCall(model)
        judged = {name: _on_rows(choices[name], surveys[name]) for members in batch for name in members}
        sums = {members[0]: sums_for(judged[members[0]], surveys[members[0]], current, method) for members in batch}
        observe(model, sums, current.tracked(calls()))
        for members in batch:
            for name in members:
                next(progress, None)
                module = layer_at(model, name)
                options = candidates(module, judged[name], sums[members[0]], method)
                error_on_held_out = partial(error_of, module, inputs=surveys[name].judge_sample)
                best = min(options, key=error_on_held_out)
                pair = easy_quant_choice(module, choices[name], surveys[name], method)
                if pair is not None and error_on_held_out(pair) < _MAX_CLIPPED_ERROR * error_on_held_out(best):
                    best = pair
                chosen[name] = replace(best, input=choices[name].input) if judged[name] is not choices[name] else best
            del sums[members[0]]
    next(progress, None)
    return {**choices, **{name: choice for part in work.ranks.gather(chosen) for name, choice in part.items()}}


def _on_rows(choice: Choice, survey: Survey) -> Choice:
    """Returns `choice`, or a copy with float input if the rows in `survey` are patches that cannot become codes on
    their own, because a whole image has one dynamic scale, or because the scale depends on the noise level. Then the
    weights are chosen and judged as if the input were not quantized."""
    if choice.input.by_patch or not isinstance(survey, PatchSurvey):
        return choice
    return replace(choice, input=FloatInput(scheme=choice.input.scheme))


def candidates(module: FloatLayer, choice: Choice, sums: Sums, method: Method) -> list[Choice]:
    """Returns the choices to compare for the layer `module`: `choice` itself, and the choices with integer weights and
    bias corrections that `method` computes from `sums`. For a convolution with groups, GPTQ is the only rounding
    method."""
    weight = weight_for(choice.transform, module.weight)
    options = [choice]
    # consumers drop the bias of a layer whose float layer has none, but always read quant_bias
    correct = method.correct and (module.bias is not None or choice.input.integer_bias)
    groups = groups_of(module)
    if correct:
        options.append(with_correction(weight, choice, sums, groups))
    for name in method.weights if groups == 1 else {"gptq"}.intersection(method.weights):
        rounded = WEIGHT_METHODS[name](weight, sums.inputs, scheme=choice.input.weights, **method.limits(name))
        if rounded is not None:
            options.append(replace(choice, weight=rounded, method=name))
            if correct:
                options.append(with_correction(weight, options[-1], sums, groups))
    return options


def easy_quant_choice(module: FloatLayer, choice: Choice, survey: Survey, method: Method) -> Choice | None:
    """Returns `choice` with the scales of weight and input that EasyQuant finds in alternation on the rows in `survey`;
    both scales may clip values. `module` is the float layer. Returns None where EasyQuant is not applicable, or gives
    no codes.

    EasyQuant is applicable if it is among the methods, the input has one static range, the layer is no convolution with
    groups, and there are held-out calls. Two more conditions avoid harm. The input must not be smoothed or rotated,
    because clipping such an input lowers the layer's error but raises the model's. And the sampled rows must reach at
    least half of the input's smallest and largest value, because values that are large in few rows would otherwise be
    clipped unnoticed.
    """
    applicable = "easy-quant" in method.weights and choice.transform is None and groups_of(module) == 1
    if not applicable or not survey.has_held_out or not isinstance(choice.input, StaticInput):
        return None
    rows, dtype = survey.fit_sample.rows.to(torch.float32), module.weight.dtype
    extent = survey.all.range()
    if not (rows.amin() <= _MIN_REACH * extent.low and rows.amax() >= _MIN_REACH * extent.high):
        return None
    limits = method.limits("easy-quant")
    result = easy_quant_pair(module.weight, rows, choice.input.qparams, choice.input.scheme, dtype, **limits)
    return (
        None
        if result is None
        else replace(choice, weight=result[0], input=replace(choice.input, qparams=result[1]), method="easy-quant")
    )


def with_correction(weight: Tensor, choice: Choice, sums: Sums, groups: int = 1) -> Choice:
    """Returns the choice with a bias correction: the mean, over the rows in `sums`, of the float output minus the
    output with quantized weight and input. `weight` is the float weight after smoothing, `groups` the number of groups
    of a convolution. Returns `choice` itself if the weight has no codes or `sums` has no rows."""
    quantized = choice.weight or round_to_nearest(weight, scheme=choice.input.weights)
    if quantized is None or sums.rows == 0:
        return choice
    integers = (in_float32(quantized.weight).to(torch.float64) * quantized.spread_scale).flatten(1)
    exact = weight.flatten(1).to(torch.float64)
    missing = _matrix_vector(exact.cpu(), sums.exact, groups) - _matrix_vector(integers.cpu(), sums.rounded, groups)
    return replace(choice, correction=missing / sums.rows)


def _matrix_vector(weight: Tensor, inputs: Tensor, groups: int) -> Tensor:
    """Returns `weight` (out, in / groups) times `inputs` (in,) as a convolution with `groups` groups multiplies them:
    (out,)."""
    if groups == 1:
        return weight @ inputs
    return (weight.view(groups, -1, weight.shape[1]) @ inputs.view(groups, -1, 1)).flatten()
