"""Integer layers: the quantization formula, the numbers of a layer, and modules that compute from these numbers exactly
what the device computes."""
