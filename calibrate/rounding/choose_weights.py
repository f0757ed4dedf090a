"""Chooses weights and biases that make up for the error of rounding in the layer's output, judged on held-out calls.

One replay sums xq xq^T and xq (x - xq)^T, for inputs x and the values xq of their codes, of as many layers at once as
memory allows, and at least of one; the methods of rounding/ do the rest. The mean of W x - Wq xq over those calls is
the correction of the bias (Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, arXiv
1906.04721, 2019). A layer where the outcome is no better than plain rounding keeps plain rounding.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ..choice import Choice
from ..layers.inputs import StaticInput
from ..layers.transforms import weight_for
from ..layers.weights import round_to_nearest
from ..observers.survey import Survey
from ..plan import FloatLayer, layer_at
from ..replay.calls import Calls
from ..replay.current_call import CurrentCall
from ..replay.hooks import observe
from ..replay.work import Work
from .easy_quant import easy_quant_pair
from .judge import error_of
from .methods import WEIGHT_METHODS, Method
from .sums import ROOM, Sums, portions_of, sharing_inputs, sums_for

_CLIPPING = 0.3  # ratio of errors: a clipped pair has to lower the layer's error by 70 %, for clipping harms the model
_SEEN = 0.5  # share of the extremes that the sampled rows have to reach: smaller rows do not show the cost of clipping


def choose_weights(
    model: nn.Module,
    choices: Mapping[str, Choice],
    surveys: Mapping[str, Survey],
    calls: Calls,
    method: Method,
    work: Work,
    room: float = ROOM,
) -> dict[str, Choice]:
    """The choices with weights and corrections by `method`, where these are better on rows of held-out calls.

    `calls`, replayed once for each `room` bytes of sums, are calls that are not held out. Deterministic; the result is
    the same for any `room`.

    Collective: the ranks of `work` share the layers. Each rank replays all of the calls, so that sums are added in the
    same order on any rank.
    """
    made: dict[str, Choice] = {}
    portions = list(portions_of(sharing_inputs(choices, surveys, work.ranks), surveys, method, room))
    count = sum(len(members) for portion in portions for members in portion)
    each_layer = iter(work.progress("weights", range(count), count))
    for portion in portions:
        current = CurrentCall(model)
        sums = {members[0]: sums_for(choices[members[0]], surveys[members[0]], current, method) for members in portion}
        observe(model, sums, current.tracked(calls()))
        for members in portion:
            for name in members:
                next(each_layer, None)
                module = layer_at(model, name)
                options = candidates(module, choices[name], sums[members[0]], method)
                judged = partial(error_of, module, inputs=surveys[name].judged)
                best, pair = min(options, key=judged), paired(module, choices[name], surveys[name], method)
                if pair is not None and judged(pair) < _CLIPPING * judged(best):
                    best = pair
                made[name] = best
            del sums[members[0]]
    next(each_layer, None)
    return {**choices, **{name: choice for part in work.ranks.gather(made) for name, choice in part.items()}}


def candidates(module: FloatLayer, choice: Choice, sums: Sums, method: Method) -> list[Choice]:
    """The choice as it is, and the choices that the method finds. Convolutions in groups only have their bias
    corrected: a method would need the sums of each group."""
    weight = weight_for(choice.transform, module.weight)
    found = [choice]
    # a consumer drops a bias where the float layer has none, and always reads quant_bias
    correct = method.correct and (module.bias is not None or choice.input.ranged)
    if correct:
        found.append(corrected(weight, choice, sums, groups_of(module)))
    for name in method.weights if groups_of(module) == 1 else ():
        rounded = WEIGHT_METHODS[name](weight, sums.inputs, scheme=choice.input.weights, **method.limits(name))
        if rounded is not None:
            found.append(replace(choice, weight=rounded, method=name))
            if correct:
                found.append(corrected(weight, found[-1], sums))
    return found


def paired(module: FloatLayer, choice: Choice, survey: Survey, method: Method) -> Choice | None:
    """The choice with scales of weight and input by EasyQuant, alternately, if EasyQuant is among the methods.

    None for a smoothed input, where clipping lowers the layer's error and raises the model's; without held-out calls;
    and where the sampled rows stay far below the extremes: a value large in few rows would be clipped unnoticed.
    """
    wanted = "easy-quant" in method.weights and choice.transform is None and groups_of(module) == 1
    if not wanted or not survey.split or not isinstance(choice.input, StaticInput):
        return None
    rows, dtype = survey.fitting.rows.to(torch.float32), module.weight.dtype
    extent = survey.all.range()
    if not (rows.amin() <= _SEEN * extent.low and rows.amax() >= _SEEN * extent.high):
        return None
    limits = method.limits("easy-quant")
    found = easy_quant_pair(module.weight, rows, choice.input.qparams, choice.input.scheme, dtype, **limits)
    return (
        None
        if found is None
        else replace(choice, weight=found[0], input=replace(choice.input, qparams=found[1]), method="easy-quant")
    )


def groups_of(module: FloatLayer) -> int:
    """The number of groups of a convolution; 1 for other layers."""
    return module.groups if isinstance(module, nn.Conv2d) else 1


def corrected(weight: Tensor, choice: Choice, sums: Sums, groups: int = 1) -> Choice:
    """The choice with a correction: the mean difference of the float output from the integers' over the sums."""
    quantized = choice.weight or round_to_nearest(weight, scheme=choice.input.weights)
    if quantized is None or sums.rows == 0:
        return choice
    integers = quantized.weight.flatten(1).to(torch.float64) * quantized.scale.to(torch.float64).unsqueeze(1)
    exact = weight.flatten(1).to(torch.float64)
    lacking = _summed(exact.cpu(), sums.exact, groups) - _summed(integers.cpu(), sums.rounded, groups)
    return replace(choice, correction=lacking / sums.rows)


def _summed(weight: Tensor, inputs: Tensor, groups: int) -> Tensor:
    """`weight` (out, in / groups) times `inputs` (in,), group by group: (out,)."""
    if groups == 1:
        return weight @ inputs
    return (weight.view(groups, -1, weight.shape[1]) @ inputs.view(groups, -1, 1)).flatten()
