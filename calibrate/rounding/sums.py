"""Sums over the calibration calls that weight rounding and bias correction need. Layers that receive the same input
share one object."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from octavo.capture.ranks import Ranks

from ..choice import Choice
from ..layers.transforms import transformed_patches
from ..native import kernels
from ..observers.patches import PatchSurvey
from ..observers.survey import Survey
from ..replay.current_call import CurrentCall
from .methods import Method
from .objective import Inputs, precision


class Strided:
    """A function that is called with one input (..., in) after another, and returns the rows that it selects from this
    input, (rows, in). Counted over the rows of all inputs, it selects the first row and every `stride`-th row after
    it."""

    def __init__(self, stride: int) -> None:
        self._stride, self._seen = stride, 0

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.detach().reshape(-1, x.shape[-1])
        first = -self._seen % self._stride
        self._seen += len(rows)
        return rows[first :: self._stride]


class Sums:
    """Sums over the calibration calls that weight rounding and bias correction need for one layer. Layers that receive
    the same tensor share one `Sums`.

    `choice` says how the layer is quantized, `current` which call is running; `columns` is the number of input
    channels. The function `read` selects the rows of an input that are summed; for a convolution, they are patches, in
    which each channel has `taps` columns. Let x be such a row, after smoothing, as
    a column vector, and xq the values of its codes. Then `exact` and `rounded` (in,) are the sums of x and of xq over
    all these rows, and `gram` and `residual` (in, in) are the sums of xq xq^T and of xq (x - xq)^T. Only the numbers on
    and above the diagonal of `gram` are summed; the property `inputs` copies them to below. If `squares` is False,
    `gram` and `residual` are None, because only biases are corrected.

    For a convolution with several `groups`, the columns of each group have sums of their own: `gram` and `residual` are
    (groups, in / groups, in / groups).

    If all rows of an input have one scale, xq is this scale times whole numbers. On the CPU a compiled kernel then sums
    products of integers. The products for `gram` are exact. For `residual`, x - xq is rounded: in each column, 512 rows
    at a time, to multiples of 1 / 16383 of the largest magnitude. In all other cases, and without the kernels, torch
    sums products of float32 numbers.
    """

    def __init__(
        self, choice: Choice, current: CurrentCall, columns: int, read: Callable[[Tensor], Tensor], squares: bool,
        taps: int = 1, groups: int = 1,
    ) -> None:  # fmt: skip
        self._choice, self._current, self.read, self._taps, self._groups = choice, current, read, taps, groups
        width = columns // groups
        kind, shape = precision(width), (width, width) if groups == 1 else (groups, width, width)
        self.rows = 0
        self.exact, self.rounded = torch.zeros(columns, dtype=torch.float64), torch.zeros(columns, dtype=torch.float64)
        self.gram = torch.zeros(shape, dtype=kind) if squares else None
        self.residual = torch.zeros(shape, dtype=kind) if squares else None
        self.key = id(self)

    def add(self, rows: Tensor) -> None:
        """Adds rows (rows, in) of the layer's input as the float model computes it; this method applies the layer's
        smoothing to the rows."""
        x = transformed_patches(self._choice.transform, rows, self._taps).to(torch.float32)
        compiled = kernels.library() if self._choice.input.integer_bias and x.device.type == "cpu" else None
        self.rows += len(x)
        if compiled is None or self._groups > 1:
            self._add_products(x, self._choice.input.represented(x, self._current.level))
            return
        for piece in x.split(_PIECE):
            self._add_integers(piece, compiled)

    def _add_products(self, x: Tensor, xq: Tensor) -> None:
        """Adds the rows `x`, whose codes stand for the values `xq`, to the sums; both are (rows, in) float32. torch
        computes the products in float32."""
        self._add_columns(x, xq)
        if self.gram is not None and self.residual is not None:
            error = x - xq
            if self._groups > 1:  # (groups, rows, in / groups)
                xq, error = (rows.unflatten(1, (self._groups, -1)).transpose(0, 1) for rows in (xq, error))
            self.gram += (xq.mT @ xq).cpu()
            self.residual += (xq.mT @ error).cpu()

    def _add_integers(self, x: Tensor, compiled: kernels.Kernels) -> None:
        """Adds the rows `x`, (rows, in) float32 on the CPU, to the sums. All their codes have one scale, so the kernels
        `compiled` compute the products in integers."""
        q, scale, zero_point = self._choice.input.codes(x, self._current.level)
        steps = q if zero_point is None else q.sub_(zero_point)
        xq = steps * scale
        self._add_columns(x, xq)
        if self.gram is not None and self.residual is not None:
            compiled.add_sums(steps.contiguous(), (x - xq).contiguous(), float(scale), self.gram, self.residual)

    def _add_columns(self, x: Tensor, xq: Tensor) -> None:
        self.exact += x.sum(0, dtype=torch.float64).cpu()
        self.rounded += xq.sum(0, dtype=torch.float64).cpu()

    @property
    def inputs(self) -> Inputs | None:
        """The second-order statistics that the rounding methods take; None if only biases are corrected, so that `gram`
        and `residual` are not summed."""
        if self.gram is None or self.residual is None:
            return None
        if self.gram.ndim == 2:
            _mirror(self.gram)
        return Inputs(self.gram, self.gram + self.residual, self.rows)


def _mirror(matrix: Tensor) -> None:
    """Makes a square matrix symmetric in place: copies the numbers above its diagonal to below."""
    for start in range(0, len(matrix), _MIRRORED):
        block = matrix[start : start + _MIRRORED]
        block[:, :start] = matrix[:start, start : start + _MIRRORED].T
        square = block[:, start : start + _MIRRORED]
        square.copy_(square.triu() + square.triu(1).T)


def sums_for(choice: Choice, survey: Survey, current: CurrentCall, method: Method) -> Sums:
    """Returns a new `Sums` for one layer, to which no rows were added yet. `choice` says how the layer is quantized,
    `survey` has observed its input, and `current` will say which call is running.

    For an input with n channels, the object sums about 32 * n rows, or all rows if there are fewer. For a convolution
    it sums patches, about 65,536 at most. The matrices `gram` and `residual` are summed only if `method` rounds
    weights.
    """
    columns, squares = survey.columns, bool(method.weights)
    rows = _ROWS_PER_CHANNEL * columns
    if isinstance(survey, PatchSurvey):
        read = survey.patches_for(min(rows, _PATCHES))
        return Sums(choice, current, columns, read, squares, survey.taps, survey.groups)
    return Sums(choice, current, columns, Strided(max(1, survey.fit_channels.rows // rows)), squares)


def layers_by_input(choices: Mapping[str, Choice], surveys: Mapping[str, Survey], ranks: Ranks) -> list[list[str]]:
    """Divides the layers of `choices` among the ranks, and returns the names of this rank's layers, in lists of layers
    that share one input. `surveys` say which layers share an input. Layers with wide inputs, which take longest, are
    assigned first."""
    shared: dict[tuple[str, int], list[str]] = {}
    for name, choice in choices.items():
        if name in surveys and surveys[name].has_input:
            shared.setdefault((surveys[name].leader, id(choice.transform)), []).append(name)
    if ranks.world == 1:
        return list(shared.values())
    return ranks.share(sorted(shared.values(), key=lambda members: -surveys[members[0]].columns))


def batches_of(
    lists: Iterable[list[str]], surveys: Mapping[str, Survey], method: Method, sums_bytes: float
) -> Iterator[list[list[str]]]:
    """Divides `lists` into batches whose `Sums` together fit in `sums_bytes` bytes, and yields the batches. Each list
    has the names of layers that share one input, and so one `Sums`. A list whose `Sums` alone are larger is a batch of
    its own. `surveys` give the number of channels of each input, and `method` what is summed."""
    batch: list[list[str]] = []
    batch_bytes = 0
    for members in lists:
        survey = surveys[members[0]]
        size = bytes_of_sums(survey.columns, method, survey.groups)
        if batch and batch_bytes + size > sums_bytes:
            yield batch
            batch, batch_bytes = [], 0
        batch.append(members)
        batch_bytes += size
    if batch:
        yield batch


def bytes_of_sums(columns: int, method: Method, groups: int = 1) -> int:
    """Returns the number of bytes of the `Sums` that `method` needs for a layer with `columns` input channels. For a
    convolution with `groups` groups, `columns` is how many numbers a patch has."""
    width = columns // groups
    return 2 * columns * width * precision(width).itemsize if method.weights else 16 * columns


_ROWS_PER_CHANNEL = 32  # rows to sum for each channel of an input: more rows change the sums little


_PIECE = 512  # rows that become codes together, for products of integers: they stay in the caches


_MIRRORED = 256  # rows that are mirrored at a time: a block of them fits in the caches


_PATCHES = 1 << 16  # most patches of a convolution's input to sum, over all calls


SUMS_BYTES = float(1 << 30)  # most bytes of sums in memory together, unless the layers of one input need more


SUMS_AT_WORK = 5  # memory that GPTQ needs while it runs, in multiples of the bytes of the layer's sums (measured: 4.0)


CALLS = 96  # most calls replayed for the sums
