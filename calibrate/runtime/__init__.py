"""Integer layers that run fast: the same integers, and the same outputs up to one rounding."""

from .attention import attend
from .models import accelerate, optimized
from .modules import BACKENDS, Int8Conv2d, Int8Linear

__all__ = ["BACKENDS", "Int8Conv2d", "Int8Linear", "accelerate", "attend", "optimized"]
