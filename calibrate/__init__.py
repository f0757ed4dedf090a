"""From recorded calls to a checkpoint of 8-bit integers.

Reading order:

1. `layers/`: the formula (`scheme`), how an input becomes codes (`inputs`), the numbers of a layer, exact modules
2. `plan`: which layers become integers, and why the others stay float
3. `replay/`: the float model on recorded calls; `observers/`: what is learned of the inputs of its layers
4. `smoothing/`, `rounding/`: transforms of inputs, and weights by what the layer's output loses
5. `choose`: all of these together, a choice for each layer; `part`, `calibration`: choose, measure, report
6. `mixed_precision/`: a scheme for each layer under a budget; `blockwise/`: models that do not fit in memory
7. `formats/`: a folder and a record for each format of a checkpoint; `runtime/`: the same integers, fast
8. `preparation/`: batch norms, inputs without data; `msmodelslim_api`: the names of ptq_tools
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .msmodelslim_api import Calibrator, QuantConfig
    from .runtime import accelerate

__all__ = ["Calibrator", "QuantConfig", "accelerate"]

_HOMES = {"Calibrator": "msmodelslim_api", "QuantConfig": "msmodelslim_api", "accelerate": "runtime"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
