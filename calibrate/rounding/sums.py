"""Sums over the calibration calls that weight rounding and bias correction need, one for each input of layers."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from octavo.capture.ranks import Ranks

from ..choice import Choice
from ..layers.transforms import transformed
from ..observers.patches import PatchSurvey
from ..observers.survey import Survey
from ..replay.current_call import CurrentCall
from .methods import Method
from .objective import Inputs, precision


class Strided:
    """Takes every `stride`-th row of all inputs (..., in)."""

    def __init__(self, stride: int) -> None:
        self._stride, self._seen = stride, 0

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.detach().reshape(-1, x.shape[-1])
        first = -self._seen % self._stride
        self._seen += len(rows)
        return rows[first :: self._stride]


class Sums:
    """Sums over the calibration calls that weight rounding and bias correction need for one layer; layers that receive
    the same tensor share one `Sums`. `read` takes the rows to sum from an input."""

    def __init__(
        self, choice: Choice, current: CurrentCall, columns: int, read: Callable[[Tensor], Tensor], squares: bool
    ) -> None:
        self._choice, self._current, self.read = choice, current, read
        kind = precision(columns)
        self.rows = 0
        self.exact, self.rounded = torch.zeros(columns, dtype=torch.float64), torch.zeros(columns, dtype=torch.float64)
        self.gram = torch.zeros(columns, columns, dtype=kind) if squares else None
        self.residual = torch.zeros(columns, columns, dtype=kind) if squares else None
        self.key = id(self)

    def add(self, rows: Tensor) -> None:
        """Adds rows (rows, in)."""
        x = transformed(self._choice.transform, rows).to(torch.float32)
        xq = self._choice.input.represented(x, self._current.level)
        lost = x - xq
        self.rows += len(x)
        self.exact += x.sum(0, dtype=torch.float64).cpu()
        self.rounded += xq.sum(0, dtype=torch.float64).cpu()
        if self.gram is not None and self.residual is not None:
            self.gram += (xq.T @ xq).cpu()
            self.residual += (xq.T @ lost).cpu()

    @property
    def inputs(self) -> Inputs | None:
        """The statistics that the rounding methods take; None where only biases are corrected."""
        if self.gram is None or self.residual is None:
            return None
        return Inputs(self.gram, self.gram + self.residual, self.rows)


def sums_for(choice: Choice, survey: Survey, current: CurrentCall, method: Method) -> Sums:
    columns = len(survey.all.low)
    rows = _ROWS_A_CHANNEL * columns
    if isinstance(survey, PatchSurvey):
        squares = bool(method.weights) and survey.patches.geometry.groups == 1
        return Sums(choice, current, columns, survey.taking(min(rows, _PATCHES)), squares)
    stride = max(1, survey.fitted.rows // rows)
    return Sums(choice, current, columns, Strided(stride), squares=bool(method.weights))


def sharing_inputs(choices: Mapping[str, Choice], surveys: Mapping[str, Survey], ranks: Ranks) -> list[list[str]]:
    """The layers of this rank, in lists that share one input. Wide layers, which take longest, are shared out first."""
    shared: dict[tuple[str, int], list[str]] = {}
    for name, choice in choices.items():
        if name in surveys and surveys[name].seen:
            shared.setdefault((surveys[name].leader, id(choice.transform)), []).append(name)
    if ranks.world == 1:
        return list(shared.values())
    return ranks.share(sorted(shared.values(), key=lambda members: -len(surveys[members[0]].all.low)))


def portions_of(
    shared: Iterable[list[str]], surveys: Mapping[str, Survey], method: Method, room: float
) -> Iterator[list[list[str]]]:
    """Yields batches of such lists whose sums fit in `room` bytes together; a list too large for that is a batch
    alone."""
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
    """The bytes of the sums of a layer with so many columns."""
    return 2 * columns**2 * precision(columns).itemsize if method.weights else 16 * columns


_ROWS_A_CHANNEL = 32  # rows to sum for each channel: more rows change the sums little


_PATCHES = 1 << 16  # most patches of a convolution to sum, over all calls


ROOM = float(1 << 30)  # most bytes of sums held at once, unless one list of layers needs more


SUMS_AT_WORK = 5  # memory of GPTQ at work, in multiples of the bytes of the layer's sums (measured: 4.0)


CALLS = 96  # most calls replayed for the sums
