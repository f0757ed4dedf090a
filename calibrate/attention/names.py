"""Defines the names of the types of quantized attention, which are those of their consumers, and the default bound.
Importing this module needs no torch."""

FP8, MXFP8 = "FP8_DYNAMIC", "MXFP8_DYNAMIC"  # of MindIE-SD
COMFY_INT8 = "comfy_kitchen_int8"  # of ComfyUI
ASCEND = (FP8, MXFP8)
ATTENTION_TYPES = (*ASCEND, COMFY_INT8)
# least SQNR in dB of the worst head of an attention that is quantized: on the bundled pipeline with W8A8_DYNAMIC
# layers, int8 attention of the modules that reach it costs 0.2 dB of the output's SQNR, and of all modules 0.6 dB
# (bench/attention_types.py)
BOUND = 40.0
