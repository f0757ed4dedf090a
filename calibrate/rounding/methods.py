"""Weights to integers by what the layer's output loses, not by what the weights do.

Every method is a function of the weight (out, in) or (out, in, height, width) and of second-order statistics of the
layer's input (`Inputs`; None: it is not known). It gives int8 codes within 127 and a float32 scale for each channel, or
None where rounding to the nearest does. No channel's `error` is above that of rounding to the nearest, and the same
arguments give the same bits.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pkgutil import resolve_name

from ..layers.weights import QuantizedWeight
from . import TABLE

# (weight, inputs, *, scheme=WEIGHT, iterations=...)
WEIGHT_METHODS: dict[str, Callable[..., QuantizedWeight | None]] = {
    name: resolve_name(place) for name, place in TABLE.items()
}


@dataclass(frozen=True)
class Method:
    """How weights are rounded (names of WEIGHT_METHODS, the best counts), and whether biases are corrected."""

    weights: tuple[str, ...] = ()
    iterations: Mapping[str, int] = field(default_factory=dict)
    correct: bool = False

    @property
    def plain(self) -> bool:
        """Whether there is nothing to find out."""
        return not self.weights and not self.correct

    def limits(self, name: str) -> dict[str, int]:
        """The limit of iterations of a method of weights, as its argument; none where it has its own."""
        return {"iterations": self.iterations[name]} if name in self.iterations else {}
