"""Integer layers: the formula, the numbers of a layer, and modules that compute with them exactly."""
