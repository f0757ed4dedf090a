"""How the input of an integer layer becomes integers: one type for each scheme."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .scheme import QParams


@dataclass(frozen=True)
class Static:
    """One range for all inputs: `qparams` per tensor; `deq` float32 (out,); `quant_bias` int32 (out,)."""

    qparams: QParams
    deq: Tensor
    quant_bias: Tensor


@dataclass(frozen=True)
class Timestep:
    """One range for each bin of noise levels: `qparams` (bins,); `deq` float32 and `quant_bias` int32 (bins, out);
    `edges` float32 (bins - 1,), ascending. The bin of a noise level is how many edges are not above it."""

    qparams: QParams
    deq: Tensor
    quant_bias: Tensor
    edges: Tensor


@dataclass(frozen=True)
class Dynamic:
    """One symmetric range for each token, found when it comes."""


class TimestepQParams(NamedTuple):
    """Parameters of an input for each bin of noise levels: `qparams` (bins,) and `edges` (bins - 1,), ascending."""

    qparams: QParams
    edges: Tensor


Activation = Static | Timestep | Dynamic


InputSpec = QParams | TimestepQParams | Dynamic


SCHEMES: dict[type, str] = {Static: "W8A8", Timestep: "W8A8_TIMESTEP", Dynamic: "W8A8_DYNAMIC", type(None): "W8A16"}
