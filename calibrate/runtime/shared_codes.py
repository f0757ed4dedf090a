"""Shares the codes of an input between the layers that receive the same tensor, such as to_q, to_k and to_v."""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from ..layers.transforms import Transform, same_transform
from .onednn_layout import Layouts


class Quantization(NamedTuple):
    """Holds what determines the codes of an input: its scale and zero point, and `transform`, which is applied to the
    input first, such as smoothing (None: no transform)."""

    scale: float
    zero_point: int
    transform: Transform | None

    def same(self, other: "Quantization") -> bool:
        """Returns whether this object and `other` give the same codes for the same input."""
        return self[:2] == other[:2] and same_transform(self.transform, other.transform)


class SharedCodes:
    """Holds what the integer layers of a model share: the codes of the last quantized input; `layers`, the set of these
    layers; and `layouts`, which packs their weights for oneDNN.

    A copy of this object starts empty, and so does an unpickled object.
    """

    def __init__(self) -> None:
        self.layouts = Layouts()
        self.layers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._last: tuple[weakref.ref[Tensor], int, Quantization, Tensor] | None = None

    def of(self, x: Tensor, quantization: Quantization, make: Callable[[], Tensor]) -> Tensor:
        """Returns the codes of `x` by `quantization`, that is, by its scale, zero point and transform. The function
        `make` computes and returns these codes. It is not called if the last call of this method had the same
        quantization and the same tensor object, unchanged since; then the codes of that call are returned again. The
        caller must not change the returned tensor."""
        if x.is_inference():  # it has no version, so a change in place would go unnoticed
            return make()
        last = self._last
        if last is not None and last[0]() is x and last[1] == x._version and last[2].same(quantization):
            return last[3]
        q = make()
        self._last = weakref.ref(x), x._version, quantization, q
        return q

    def __reduce__(self) -> Any:
        return SharedCodes, ()
