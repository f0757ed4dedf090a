"""Defines the names of the schemes of integer layers, which are those of Huawei's quantization tool msModelSlim, and
the sizes of rotations. Importing this module needs no torch."""

STATIC, TIMESTEP, DYNAMIC, WEIGHT_ONLY = "W8A8", "W8A8_TIMESTEP", "W8A8_DYNAMIC", "W8A16"
SCHEMES = (STATIC, WEIGHT_ONLY, DYNAMIC, TIMESTEP)  # in the order in which the files of a checkpoint are looked for
RANGED = (STATIC, TIMESTEP)  # the ranges of inputs are known beforehand
# the numbers of channels in a group that a rotation may mix, and of the 4 x 4 matrices whose Kronecker product mixes
# them
ROTATIONS = {16: 2, 64: 3, 256: 4}
