"""Rounds weights to integers by the error of the layer's output: methods, their sums, and the judge between them."""

# Rounding methods on the command line, and the module and function of each. The table is light, so that help is there
# before torch is loaded; `methods.WEIGHT_METHODS` has the functions.
TABLE = {
    "round-to-nearest": "octavo.calibrate.layers.weights:round_to_nearest",
    "easy-quant": "octavo.calibrate.rounding.easy_quant:easy_quant",
    "admm": "octavo.calibrate.rounding.admm:admm",
    "adaround": "octavo.calibrate.rounding.adaround:adaround",
    "gptq": "octavo.calibrate.rounding.gptq:gptq",
}
