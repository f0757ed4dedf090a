"""Lists the words that options accept.

Most of these lists repeat the keys of tables whose modules import torch, because `octavo --help` must not wait for
torch; tests/octavo/test_words.py checks that each list equals its table, in the same order. The tables of formats and
of rounding methods import nothing heavy, so their lists are made from the tables.
"""

from octavo.calibrate import rounding
from octavo.calibrate.formats import CLASSIFIER, DENOISER, TABLE, names_for
from octavo.calibrate.layers import schemes

OBSERVERS = ("minmax", "sigma", "percentile", "mse")
WEIGHT_METHODS = tuple(rounding.TABLE)
RECIPES = ("plain", "fast", "balanced", "best")
ROTATION = ("off", "auto", "16", "64", "256")
ACTIVATIONS = ("static", "timestep", "dynamic")  # the table also has "float", which --weight-only chooses
ATTENTION = ("off", "report", "write")
ELEMENTS, WEIGHT_SCALES = schemes.ELEMENTS, schemes.WEIGHT_SCALES
FORMATS = tuple(TABLE)
DENOISER_FORMATS, CLASSIFIER_FORMATS = names_for(DENOISER), names_for(CLASSIFIER)
DTYPES = ("float32", "float16", "bfloat16")
PROMPT_SETS = ("demo", "demo-heldout", "images", "videos")
FAMILIES = (
    "sd3", "opensora", "opensora-plan", "flux", "flux2", "wan", "hunyuanvideo", "hunyuanvideo15", "qwenimage", "pixart",
    "sana", "cogvideox", "ltx", "ltx2", "sdxl",
)  # fmt: skip
