"""Format `modelopt`: the transformer directory of an FP8 model for vLLM-Omni and SGLang-diffusion on CUDA, in the
layout of NVIDIA's ModelOpt."""
