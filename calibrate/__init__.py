"""Turns recorded calls of a float model into a checkpoint of 8-bit integers.

Reading order:

1. `layers/`: the quantization formula (`scheme`), how an input becomes codes (`inputs`), the tensors of an integer
   layer, modules that compute such a layer exactly
2. `plan`: which layers become integers, and why the others stay float
3. `replay/`: runs the float model on recorded calls; `observers/`: record statistics of the inputs of its layers;
   `attention/`: measures the error that quantized attention would have
4. `smoothing/`: chooses smoothing factors; `rounding/`: chooses integer weights that keep the layer's output
5. `choose`: uses 3 and 4 to choose the integer form of each layer; `part`, `calibration`: run `choose`, measure the
   integer layers, report
6. `mixed_precision/`: a scheme for each layer under a budget; `blockwise/`: models that do not fit in memory
7. `formats/`: reads and writes checkpoints, one folder for each format; `runtime/`: computes integer layers fast
8. `preparation/`: folds batch norms, makes inputs where there are no data; `msmodelslim_api`: msModelSlim's API
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
