"""Defines the names of three kinds of things in the format `ascend`: files, keys in the description (the JSON file that
gives the scheme of each tensor) and in the metadata of the weight file, and tensors.

The names are those of msModelSlim and MindIE-SD. Keys that begin with octavo are Octavo's own; no other software reads
them.
"""

from ...layers.schemes import MXFP8, SCHEMES

HELD = (*SCHEMES, MXFP8)  # schemes that a checkpoint may hold, in the order in which its files are tried
WEIGHT_FILE = "quant_model_weight_{}.safetensors"
DESCRIPTION_FILE = "quant_model_description_{}.json"
MODEL_TYPE = "model_quant_type"
# keys of the weight file's metadata
GEOMETRY = "octavo.geometry"  # stride, padding, dilation and groups of each convolution, by name
LEVELS = "octavo.timesteps"  # the noise level of each row of W8A8_TIMESTEP layers
EDGES = "octavo.edges"  # the noise levels that separate the bins of each W8A8_TIMESTEP layer, by name
CORRECTED = "octavo.corrected"  # names of the layers whose quant_bias includes a bias correction
MADE_BIASES = "octavo.made_biases"  # names of the layers that have a bias only for the correction, none in float
DTYPE = "octavo.dtype"  # dtype of the float layers of W8A8_MXFP8 layers, whose biases are written in float32
# parts of tensor names in a layer with a smoothing multiplier, as MindIE-SD reads them
MUL_SCALE, INNER = "div.mul_scale", "linear."
# last parts of names of a module with quantized attention: its type, which is no tensor, and its rotations
QUANT_TYPE, ROTATIONS = "quant_type", ("q_rot", "k_rot")


def file_names(scheme: str) -> tuple[str, str]:
    """Returns the names under which MindIE-SD looks for the weight file and the description of a checkpoint with this
    `scheme`, such as "W8A8"."""
    return WEIGHT_FILE.format(scheme.lower()), DESCRIPTION_FILE.format(scheme.lower())
