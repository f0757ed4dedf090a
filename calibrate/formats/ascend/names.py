"""Names of the format `ascend`: of files, of keys in the description and the metadata, and of parts of tensors' names.

They are those of msModelSlim and MindIE-SD; keys that begin with octavo are read by this package alone.
"""

WEIGHT_FILE = "quant_model_weight_{}.safetensors"
DESCRIPTION_FILE = "quant_model_description_{}.json"
MODEL_TYPE = "model_quant_type"
GEOMETRY = "octavo.geometry"  # metadata key: the geometry of convolutions by name; further metadata keys:
LEVELS = "octavo.timesteps"  # the noise level of each row
EDGES = "octavo.edges"  # the edges between the bins of each layer, by name
CORRECTED = "octavo.corrected"  # layers whose quant_bias carries more than their bias
MADE_BIASES = "octavo.made_biases"  # layers whose float form has no bias
MUL_SCALE, INNER = "div.mul_scale", "linear."  # parts of names in a layer with a multiplier, as MindIE-SD reads them


def file_names(scheme: str) -> tuple[str, str]:
    """The names under which the consumer looks for weights and description."""
    return WEIGHT_FILE.format(scheme.lower()), DESCRIPTION_FILE.format(scheme.lower())
