"""The table of rounding methods, which choose a weight's codes by the error of the layer's output, not of the weight.

Every method is a function of the weight, (out, in) or (out, in, height, width), and of second-order statistics of the
layer's input (`Inputs`; None: unknown). A method returns int8 codes from -127 to 127 and a float32 scale for each
output channel, or None if a channel is too small for a float32 scale. In no channel is the output error
(`objective.error`) greater than with rounding to the nearest. The same arguments give the same bits.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pkgutil import resolve_name

from ..layers.weights import QuantizedWeight
from . import TABLE

# functions called as method(weight, inputs, *, scheme=WEIGHT, iterations=...)
WEIGHT_METHODS: dict[str, Callable[..., QuantizedWeight | None]] = {
    name: resolve_name(path) for name, path in TABLE.items()
}


@dataclass(frozen=True)
class Method:
    """Holds how weights and biases are chosen: `weights` names the rounding methods to try (keys of WEIGHT_METHODS), of
    which the best result is used. `iterations` is a dict from the name of a method to its number of iterations.
    `correct` says whether biases are corrected."""

    weights: tuple[str, ...] = ()
    iterations: Mapping[str, int] = field(default_factory=dict)
    correct: bool = False

    @property
    def plain(self) -> bool:
        """True if weights are rounded to the nearest and biases are not corrected. Then no sums over calls (`Sums`)
        are needed."""
        return not self.weights and not self.correct

    def limits(self, name: str) -> dict[str, int]:
        """Returns the keyword arguments for the rounding method `name`: `iterations`, or {} if the method's own default
        applies."""
        return {"iterations": self.iterations[name]} if name in self.iterations else {}
