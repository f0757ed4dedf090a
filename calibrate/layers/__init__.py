"""Integer layers: the quantization formula; the weight codes, scales, deq and quant_bias of a layer; and modules that
compute from these numbers exactly what an Ascend device computes."""
