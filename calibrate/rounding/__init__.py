"""Rounds weights to integers by the error of the layer's output: methods, their sums, and the judge between them."""
