"""Words that options accept. They repeat the keys of tables that import torch, which `octavo --help` must not wait for.

tests/octavo/test_words.py holds each list equal to its table, in the same order. The tables of formats and of rounding
methods import nothing: they are read.
"""

from octavo.calibrate import rounding
from octavo.calibrate.formats import CLASSIFIER, DENOISER, TABLE, names_for

OBSERVERS = ("minmax", "sigma", "percentile", "mse")
WEIGHT_METHODS = tuple(rounding.TABLE)
RECIPES = ("plain", "fast", "balanced", "best")
ACTIVATIONS = ("static", "timestep", "dynamic")  # the table's without "float", which is --weight-only
FORMATS = tuple(TABLE)
DENOISER_FORMATS, CLASSIFIER_FORMATS = names_for(DENOISER), names_for(CLASSIFIER)
DTYPES = ("float32", "float16", "bfloat16")
PROMPT_SETS = ("demo", "demo-heldout", "images", "videos")
FAMILIES = (
    "sd3", "opensora", "opensora-plan", "flux", "flux2", "wan", "hunyuanvideo", "hunyuanvideo15", "qwenimage", "pixart",
    "sana", "cogvideox", "ltx", "ltx2", "sdxl",
)  # fmt: skip
