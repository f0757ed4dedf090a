"""Fast forms of integer layers. Their integers are the same as in the layers of calibrate/layers, and their outputs
differ from the outputs of these layers by at most one rounding."""

from .accelerate import accelerate, optimized
from .int8_modules import BACKENDS, Int8Conv2d, Int8Linear
from .operators import attend

__all__ = ["BACKENDS", "Int8Conv2d", "Int8Linear", "accelerate", "attend", "optimized"]
