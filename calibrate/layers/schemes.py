"""Defines the names of the schemes of 8-bit layers, which are those of Huawei's quantization tool msModelSlim where it
has one, and the sizes of rotations. Importing this module needs no torch."""

from typing import NamedTuple

STATIC, TIMESTEP, DYNAMIC, WEIGHT_ONLY = "W8A8", "W8A8_TIMESTEP", "W8A8_DYNAMIC", "W8A16"
FP8_STATIC, FP8_TIMESTEP, FP8_DYNAMIC = "W8A8_FP8", "W8A8_FP8_TIMESTEP", "W8A8_FP8_DYNAMIC"
FP8_WEIGHT_ONLY, MXFP8, MXFP8_WEIGHT_ONLY = "W8A16_FP8", "W8A8_MXFP8", "W8A16_MXFP8"
# for each element type, a dict from the way in which inputs become codes (a value of --activations, or "float" for
# --weight-only) to the scheme's name; the first way is the default
NAMES = {
    "int8": {"static": STATIC, "timestep": TIMESTEP, "dynamic": DYNAMIC, "float": WEIGHT_ONLY},
    "fp8": {"static": FP8_STATIC, "timestep": FP8_TIMESTEP, "dynamic": FP8_DYNAMIC, "float": FP8_WEIGHT_ONLY},
    "mxfp8": {"dynamic": MXFP8, "float": MXFP8_WEIGHT_ONLY},
}
ELEMENTS = tuple(NAMES)
WEIGHT_SCALES = ("channel", "tensor")  # one scale for each output channel, or for the whole weight
SCHEMES = (STATIC, WEIGHT_ONLY, DYNAMIC, TIMESTEP)  # of integers, in the order in which a checkpoint's files are tried
FP8_SCHEMES = (FP8_STATIC, FP8_WEIGHT_ONLY, FP8_DYNAMIC, FP8_TIMESTEP, MXFP8, MXFP8_WEIGHT_ONLY)
RANGED = (STATIC, TIMESTEP)  # the ranges of inputs are known beforehand, and codes are integers
FP8_RANGED = (FP8_STATIC, FP8_TIMESTEP)  # the ranges of inputs are known beforehand, and codes are FP8 numbers
BLOCK = 32  # channels of an input, or columns of a weight, that share a scale in MXFP8
# the numbers of channels in a group that a rotation may mix, and of the 4 x 4 matrices whose Kronecker product mixes
# them
ROTATIONS = {16: 2, 64: 3, 256: 4}


class Instead(NamedTuple):
    """Names what a layer may get instead of its scheme: another `scheme`, whose ranges are not known beforehand, such
    as W8A8_FP8_DYNAMIC, and a rotation of its input in groups of `rotation` channels (0: none)."""

    scheme: str
    rotation: int = 0
