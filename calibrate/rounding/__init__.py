"""Rounds weights to integers so that the error of the layer's output is small: rounding methods, the sums that they
need, and the judge that compares the methods."""

# names of the rounding methods on the command line, with the module and function of each. The table is text, so that
# --help need not import torch; `methods.WEIGHT_METHODS` has the functions.
TABLE = {
    "round-to-nearest": "octavo.calibrate.layers.weights:round_to_nearest",
    "easy-quant": "octavo.calibrate.rounding.easy_quant:easy_quant",
    "admm": "octavo.calibrate.rounding.admm:admm",
    "adaround": "octavo.calibrate.rounding.adaround:adaround",
    "gptq": "octavo.calibrate.rounding.gptq:gptq",
}
