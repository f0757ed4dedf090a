"""Fast forms of integer layers. They compute with the same integers as the layers of calibrate/layers; the outputs of
both differ by at most one rounding."""

from .accelerate import accelerate, optimized
from .int8_modules import BACKENDS, Int8Conv2d, Int8Linear
from .operators import attend

__all__ = ["BACKENDS", "Int8Conv2d", "Int8Linear", "accelerate", "attend", "optimized"]
