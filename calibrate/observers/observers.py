"""Observers: each finds the range of a layer's input that the integer codes have to represent.

An observer reads statistics from tensors (`read`, called once for all layers that receive the same tensor), adds up
these statistics (`add`) and returns a range (`range`). The range has the same bits for any order of the tensors and for
any batching of the samples. The tensors may also be divided among several observers that are merged afterwards.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ..layers.scheme import ACTIVATION, Range, Scheme
from .extremes import Extremes, extremes
from .histogram import Histogram, best_clip
from .token_sums import BatchedMoments, TokenSums, read_tokens


@dataclass(frozen=True)
class Options:
    """Holds the options of observers: `sigma` is half the width of the range of the observer `Sigma`, in standard
    deviations (0: from minimum to maximum). The observer `Percentile` chooses the range from percentile 100 -
    `percentile` to `percentile`. `scheme` is the rule by which inputs become codes, such as asymmetric int8."""

    sigma: float = 25.0  # half the width of the range, in standard deviations; 0: the range from minimum to maximum
    percentile: float = 99.99  # per cent of the values not above the top of the range; as many are not below its bottom
    scheme: Scheme = ACTIVATION


class Observer(Protocol):
    """Gathers statistics of one layer's inputs, such as their extremes, and chooses the range of the input from
    them."""

    def __init__(self, options: Options) -> None: ...

    @property
    def read(self) -> Callable[[Tensor], Any]:
        """The function that returns the statistics of one tensor. The function raises ValueError if the tensor is empty
        or contains NaN or infinities."""

    def add(self, reading: Any) -> None:
        """Adds `reading`, the statistics of one tensor, which the function `read` returned."""

    def merge(self, other: Any) -> None:
        """Adds all statistics that were added to `other`, an observer of the same class."""

    def range(self) -> Range:
        """Returns the range that codes have to represent. Raises ValueError if no statistics were added."""


class MinMax:
    """Chooses the range from the smallest to the largest value of all added tensors."""

    read = staticmethod(extremes)

    def __init__(self, options: Options) -> None:
        self._extent: Extremes | None = None

    def add(self, reading: Extremes) -> None:
        extent = self._extent or reading
        self._extent = Extremes(min(extent.low, reading.low), max(extent.high, reading.high))

    def merge(self, other: "MinMax") -> None:
        if other._extent is not None:
            self.add(other._extent)

    def range(self) -> Range:
        if self._extent is None:
            raise ValueError("no input was observed")
        return Range(*self._extent)


class SigmaReading(NamedTuple):
    """The statistics of one tensor for the observer `Sigma`: its smallest and largest value, and the sums and sums of
    squares of its rows."""

    extent: Extremes
    rows: TokenSums


class Sigma:
    """Chooses the range from mean - sigma * std to mean + sigma * std of all values, where sigma is `options.sigma`,
    cut at the smallest and the largest value. A sigma of 0 gives the range from the smallest to the largest value."""

    def __init__(self, options: Options) -> None:
        self._sigma = options.sigma
        self._extent = MinMax(options)
        self._moments = BatchedMoments()

    @staticmethod
    def read(x: Tensor) -> SigmaReading:
        return SigmaReading(*read_tokens(x))

    def add(self, reading: SigmaReading) -> None:
        self._extent.add(reading.extent)
        self._moments.add(reading.rows)

    def merge(self, other: "Sigma") -> None:
        self._extent.merge(other._extent)
        self._moments.merge(other._moments)

    def moments(self) -> tuple[float, float]:
        """Returns mean and standard deviation of all values of the added tensors."""
        return self._moments.moments().mean_and_std()

    def range(self) -> Range:
        low, high = self._extent.range()
        if self._sigma == 0:
            return Range(low, high)
        mean, std = self.moments()
        mean = min(max(mean, low), high)  # rounding must not push the mean out of the extremes
        return Range(max(low, mean - self._sigma * std), min(high, mean + self._sigma * std))


class Percentile:
    """Chooses the range from percentile 100 - p to percentile p of all values, where p is `options.percentile`."""

    read = staticmethod(Histogram.of)

    def __init__(self, options: Options) -> None:
        self._percentile = options.percentile
        self._histogram = Histogram()

    def add(self, reading: Histogram) -> None:
        self._histogram.merge(reading)

    def merge(self, other: "Percentile") -> None:
        self._histogram.merge(other._histogram)

    def range(self) -> Range:
        return self._histogram.percentiles(self._percentile)


class MSE:
    """Chooses the range with which the codes of all values have the smallest mean squared error. The error includes
    that of clipped values."""

    read = staticmethod(Histogram.of)

    def __init__(self, options: Options) -> None:
        self._scheme = options.scheme
        self._histogram = Histogram()

    def add(self, reading: Histogram) -> None:
        self._histogram.merge(reading)

    def merge(self, other: "MSE") -> None:
        self._histogram.merge(other._histogram)

    def range(self) -> Range:
        return best_clip(self._histogram, self._scheme)


OBSERVERS: dict[str, type[Observer]] = {"minmax": MinMax, "sigma": Sigma, "percentile": Percentile, "mse": MSE}
