"""Observers, which find the range of a layer's input that the integers have to represent.

An observer reads tensors (`read`, once for all layers that receive the same tensor), adds up the readings (`add`) and
returns a range. The result does not depend on the order of the tensors, on how samples are batched, or on how many
observers shared the work and were merged afterwards: any of these gives the same bits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ..layers.scheme import ACTIVATION, Range, Scheme
from .extremes import Extremes, extremes
from .histogram import Histogram, best_clip
from .token_sums import PendingMoments, Rows


@dataclass(frozen=True)
class Options:
    """The options of observers."""

    sigma: float = 25.0  # half width of the range in standard deviations; 0: minimum and maximum
    percentile: float = 99.99  # per cent of the values that lie at or below the top of the range, and above its bottom
    scheme: Scheme = ACTIVATION


class Observer(Protocol):
    """Gathers statistics of the inputs of one layer."""

    def __init__(self, options: Options) -> None: ...

    @property
    def read(self) -> Callable[[Tensor], Any]:
        """A function that reads the statistics of one tensor. It raises ValueError when the tensor is empty or holds
        values that are not finite."""

    def add(self, reading: Any) -> None:
        """Adds a reading that `read` returned."""

    def merge(self, other: Any) -> None:
        """Adds all readings of `other`."""

    def range(self) -> Range:
        """The range to represent. Raises ValueError without readings."""


class MinMax:
    """Observer of the smallest and the largest value."""

    read = staticmethod(extremes)

    def __init__(self, options: Options) -> None:
        self._extent: Extremes | None = None

    def add(self, reading: Extremes) -> None:
        known = self._extent or reading
        self._extent = Extremes(min(known.low, reading.low), max(known.high, reading.high))

    def merge(self, other: "MinMax") -> None:
        if other._extent is not None:
            self.add(other._extent)

    def range(self) -> Range:
        if self._extent is None:
            raise ValueError("saw no data")
        return Range(*self._extent)


class SigmaReading(NamedTuple):
    """A tensor's statistics for `Sigma`: extremes, and sums of rows."""

    extent: Extremes
    rows: Rows


class Sigma:
    """Observer of the range mean - sigma * std to mean + sigma * std of all values, cut at the extremes."""

    def __init__(self, options: Options) -> None:
        self._sigma = options.sigma
        self._extent = MinMax(options)
        self._moments = PendingMoments()

    @staticmethod
    def read(x: Tensor) -> SigmaReading:
        return SigmaReading(extremes(x), Rows(x.detach()))

    def add(self, reading: SigmaReading) -> None:
        self._extent.add(reading.extent)
        self._moments.add(reading.rows)

    def merge(self, other: "Sigma") -> None:
        self._extent.merge(other._extent)
        self._moments.merge(other._moments)

    def moments(self) -> tuple[float, float]:
        """Mean and standard deviation of all values."""
        return self._moments.settled().mean_and_std()

    def range(self) -> Range:
        low, high = self._extent.range()
        if self._sigma == 0:
            return Range(low, high)
        mean, std = self.moments()
        mean = min(max(mean, low), high)  # rounding must not push the mean out of the extremes
        return Range(max(low, mean - self._sigma * std), min(high, mean + self._sigma * std))


class Percentile:
    """Observer of the range between two percentiles: `options.percentile` and its counterpart at the other end."""

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
    """Observer of the range whose integers have the smallest squared error."""

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
