"""Integer layers: the quantization formula, the numbers of a layer, and modules that compute with these numbers
exactly."""
