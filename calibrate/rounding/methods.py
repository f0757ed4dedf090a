"""The table of methods that round weights by the error of the layer's output, not by the error of the weights.

Every method is a function of the weight (out, in) or (out, in, height, width) and of second-order statistics of the
layer's input (`Inputs`; None: unknown). A method gives int8 codes within 127 and a float32 scale for each channel, or
None where rounding to the nearest gives None. No channel's `error` is above that of rounding to the nearest, and the
same arguments give the same bits.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pkgutil import resolve_name

from ..layers.weights import QuantizedWeight
from . import TABLE

# each called as method(weight, inputs, *, scheme=WEIGHT, iterations=...)
WEIGHT_METHODS: dict[str, Callable[..., QuantizedWeight | None]] = {
    name: resolve_name(place) for name, place in TABLE.items()
}


@dataclass(frozen=True)
class Method:
    """The methods to round weights with (names of WEIGHT_METHODS; the best is kept), and whether to correct biases."""

    weights: tuple[str, ...] = ()
    iterations: Mapping[str, int] = field(default_factory=dict)
    correct: bool = False

    @property
    def plain(self) -> bool:
        """Whether weights are rounded to the nearest and biases stay, so that no sums are needed."""
        return not self.weights and not self.correct

    def limits(self, name: str) -> dict[str, int]:
        """The keyword argument `iterations` of a weight method; empty where the method's own default holds."""
        return {"iterations": self.iterations[name]} if name in self.iterations else {}
