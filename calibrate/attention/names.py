"""Defines the names of the types of quantized attention, which are those of their consumers, and the default bound.
Importing this module needs no torch."""

FP8, MXFP8 = "FP8_DYNAMIC", "MXFP8_DYNAMIC"  # of MindIE-SD
COMFY_INT8 = "comfy_kitchen_int8"  # of ComfyUI
ASCEND = (FP8, MXFP8)
ATTENTION_TYPES = (*ASCEND, COMFY_INT8)
BOUND = 40.0  # least SQNR in dB of the worst head
