"""Weights and biases that make up for what rounding costs the layer's output, judged on calls held out.

One replay sums, for inputs x and what their integers stand for, xq: xq xq^T and xq (x - xq)^T, of as many layers as
there is room for at once, and at least of one; the methods of rounding/ do the rest. The mean of W x - Wq xq over those
calls is what the bias lacks (Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction,
arXiv 1906.04721, 2019). A layer where the outcome is no better than plain rounding keeps plain rounding.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from octavo.capture.ranks import ALONE, Ranks

from .calls import Calls, Progress
from .choice import Choice, divided, error_of
from .freeze import Dynamic, InputSpec, TimestepQParams
from .integers import dynamic_codes
from .noise import bins_of
from .patches import PatchSurvey
from .plan import FloatLayer, layer_at
from .replay import observe
from .rounding import WEIGHT_METHODS, Inputs, easy_quant_pair
from .rounding.objective import precision
from .scheme import ACTIVATION, QParams, Scheme, codes, dequantize
from .survey import Survey, Turn
from .weights import round_to_nearest

ROOM = float(1 << 30)  # bytes of sums held at once
WORK = 5  # times the bytes of a layer's sums: what GPTQ makes of them (measured: 4.0)
_CLIPPING = 0.3  # of the error: a model loses by clipping what a layer gains a little by
_SEEN = 0.5  # of the largest values: rows without such do not tell what clipping costs
CALLS = 96  # enough to replay for the sums
_ROWS_A_CHANNEL = 32  # more rows than this many times the channels change the sums little
_PATCHES = 1 << 16  # of a convolution, in all


@dataclass(frozen=True)
class Method:
    """How weights are rounded (names of WEIGHT_METHODS, the best counts), and whether biases are corrected."""

    weights: tuple[str, ...] = ()
    iterations: Mapping[str, int] = field(default_factory=dict)
    seed: int = 0
    correct: bool = False
    scheme: Scheme = ACTIVATION  # of inputs

    @property
    def plain(self) -> bool:
        """Whether there is nothing to find out."""
        return not self.weights and not self.correct

    def limits(self, name: str) -> dict[str, int]:
        """The limit of iterations of a method of weights, as its argument; none where it has its own."""
        return {"iterations": self.iterations[name]} if name in self.iterations else {}


class Strided:
    """Takes one row in so many of all inputs (..., in)."""

    def __init__(self, stride: int) -> None:
        self._stride, self._seen = stride, 0

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.detach().reshape(-1, x.shape[-1])
        first = -self._seen % self._stride
        self._seen += len(rows)
        return rows[first :: self._stride]


class Sums:
    """Of the inputs of one layer, and of those that are given the same; `read` takes the rows to sum."""

    def __init__(
        self, choice: Choice, turn: Turn, columns: int, read: Callable[[Tensor], Tensor], squares: bool
    ) -> None:
        self._choice, self._turn, self.read = choice, turn, read
        kind = precision(columns)
        self.rows = 0
        self.exact, self.rounded = torch.zeros(columns, dtype=torch.float64), torch.zeros(columns, dtype=torch.float64)
        self.gram = torch.zeros(columns, columns, dtype=kind) if squares else None
        self.residual = torch.zeros(columns, columns, dtype=kind) if squares else None
        self.key = id(self)

    def add(self, rows: Tensor) -> None:
        """Takes in rows (rows, in)."""
        multiplier = self._choice.multiplier
        x = (rows if multiplier is None else rows * multiplier.to(rows.dtype)).to(torch.float32)
        xq = represented(x, self._choice.spec, self._turn.level)
        lost = x - xq
        self.rows += len(x)
        self.exact += x.sum(0, dtype=torch.float64).cpu()
        self.rounded += xq.sum(0, dtype=torch.float64).cpu()
        if self.gram is not None and self.residual is not None:
            self.gram += (xq.T @ xq).cpu()
            self.residual += (xq.T @ lost).cpu()

    @property
    def inputs(self) -> Inputs | None:
        """What the methods of rounding want to know."""
        if self.gram is None or self.residual is None:
            return None
        return Inputs(self.gram, self.gram + self.residual, self.rows)


def represented(x: Tensor, spec: InputSpec | None, level: float | None) -> Tensor:
    """What the integers of `x` (rows, in) float32 stand for, at this noise level."""
    if spec is None:
        return x
    if isinstance(spec, Dynamic):
        q, scale = dynamic_codes(x, (-1,))
        return q.to(torch.float32) * scale
    qparams = spec
    if isinstance(spec, TimestepQParams):
        at = bins_of(torch.tensor(0.0 if level is None else level), spec.edges)
        qparams = QParams(spec.qparams.scale[at], spec.qparams.zero_point[at])
    assert isinstance(qparams, QParams)
    on = QParams(*(each.to(x.device) for each in qparams))
    return dequantize(codes(x, on, ACTIVATION), on, ACTIVATION)


def compensated(
    model: nn.Module,
    choices: Mapping[str, Choice],
    surveys: Mapping[str, Survey],
    calls: Calls,
    method: Method,
    progress: Progress,
    ranks: Ranks = ALONE,
    room: float = ROOM,
) -> dict[str, Choice]:
    """The choices with weights and corrections by `method`, where these are better on rows of calls held out.

    `calls`, replayed once for each `room` bytes of sums, are some of those not held out. Deterministic; the
    same for any `room`.

    Collective: `ranks` share the layers. Each replays all of the calls, so that sums are added in the same order
    whichever rank has them.
    """
    made: dict[str, Choice] = {}
    portions = list(_portions(_shared(choices, surveys, ranks), surveys, method, room))
    count = sum(len(members) for portion in portions for members in portion)
    each_layer = iter(progress("weights", range(count), count))
    for portion in portions:
        turn = Turn(model)
        sums = {members[0]: _sums(choices[members[0]], surveys[members[0]], turn, method) for members in portion}
        observe(model, sums, turn.each(calls()))
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
    return {**choices, **{name: choice for part in ranks.gather(made) for name, choice in part.items()}}


def _sums(choice: Choice, survey: Survey, turn: Turn, method: Method) -> Sums:
    columns = len(survey.all.low)
    rows = _ROWS_A_CHANNEL * columns
    if isinstance(survey, PatchSurvey):
        squares = bool(method.weights) and survey.patches.geometry.groups == 1
        return Sums(choice, turn, columns, survey.taking(min(rows, _PATCHES)), squares)
    stride = max(1, survey.fitted.rows // rows)
    return Sums(choice, turn, columns, Strided(stride), squares=bool(method.weights))


def _shared(choices: Mapping[str, Choice], surveys: Mapping[str, Survey], ranks: Ranks) -> list[list[str]]:
    """The layers of this rank, together those with one input: wide ones, which take the longest, are dealt first."""
    shared: dict[tuple[str, int], list[str]] = {}
    for name, choice in choices.items():
        if name in surveys and surveys[name].seen:
            shared.setdefault((surveys[name].leader, id(choice.multiplier)), []).append(name)
    if ranks.world == 1:
        return list(shared.values())
    return ranks.share(sorted(shared.values(), key=lambda members: -len(surveys[members[0]].all.low)))


def _portions(
    shared: Iterable[list[str]], surveys: Mapping[str, Survey], method: Method, room: float
) -> Iterator[list[list[str]]]:
    """Lists of layers with one input, whose sums fit in `room` bytes together, or of one alone."""
    portion: list[list[str]] = []
    held = 0
    for members in shared:
        size = bytes_of_sums(len(surveys[members[0]].all.low), method)
        if portion and held + size > room:
            yield portion
            portion, held = [], 0
        portion.append(members)
        held += size
    if portion:
        yield portion


def bytes_of_sums(columns: int, method: Method) -> int:
    """Those of a layer of so many columns."""
    return 2 * columns**2 * precision(columns).itemsize if method.weights else 16 * columns


def candidates(module: FloatLayer, choice: Choice, sums: Sums, method: Method) -> list[Choice]:
    """The choice as it is, and with what the method finds. Convolutions in groups have their bias corrected alone: a
    method would need the sums of each group."""
    weight = divided(module, choice.multiplier)
    found = [choice]
    # a consumer drops a bias that the float layer has not; quant_bias it always reads
    correct = method.correct and (module.bias is not None or isinstance(choice.spec, (QParams, TimestepQParams)))
    if correct:
        found.append(corrected(weight, choice, sums, groups_of(module)))
    for name in method.weights if groups_of(module) == 1 else ():
        rounded = WEIGHT_METHODS[name](weight, sums.inputs, seed=method.seed, **method.limits(name))
        if rounded is not None:
            found.append(replace(choice, weight=rounded, method=name))
            if correct:
                found.append(corrected(weight, found[-1], sums))
    return found


def paired(module: FloatLayer, choice: Choice, survey: Survey, method: Method) -> Choice | None:
    """The choice with scales of the weight and of its input by EasyQuant, in turns, if that is among the methods.

    Not of a smoothed input: what clipping saves a layer there, it costs the model. Nor without calls held out, and
    where the rows it is found by do not show how large values are: what is large in few rows would be clipped unseen.
    """
    spec = choice.spec
    wanted = "easy-quant" in method.weights and choice.multiplier is None and groups_of(module) == 1
    if not wanted or not survey.split or not isinstance(spec, QParams):
        return None
    rows, dtype = survey.fitting.rows.to(torch.float32), module.weight.dtype
    extent = survey.all.range()
    if not (rows.amin() <= _SEEN * extent.low and rows.amax() >= _SEEN * extent.high):
        return None
    limits = method.limits("easy-quant")
    found = easy_quant_pair(module.weight, rows, spec, method.scheme, dtype, seed=method.seed, **limits)
    return None if found is None else replace(choice, weight=found[0], spec=found[1], method="easy-quant")


def groups_of(module: FloatLayer) -> int:
    """1 but for convolutions in groups."""
    return module.groups if isinstance(module, nn.Conv2d) else 1


def corrected(weight: Tensor, choice: Choice, sums: Sums, groups: int = 1) -> Choice:
    """The choice with what its outputs lack on average."""
    quantized = choice.weight or round_to_nearest(weight)
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
