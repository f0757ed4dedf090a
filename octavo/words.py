"""Words that options accept. They repeat the keys of tables that import torch, which `octavo --help` must not wait for.

tests/octavo/test_words.py holds each list equal to its table, in the same order.
"""

OBSERVERS = ("minmax", "sigma", "percentile", "mse")
WEIGHT_METHODS = ("round-to-nearest", "easy-quant", "admm", "adaround", "gptq")
RECIPES = ("plain", "fast", "balanced", "best")
ACTIVATIONS = ("static", "timestep", "dynamic")  # SCHEMES without "float", which is --weight-only
FORMATS = ("ascend", "diffusers", "torchao", "onnx", "ascend-onnx")
DENOISER_FORMATS = ("ascend", "diffusers", "torchao")
CLASSIFIER_FORMATS = ("ascend", "onnx", "ascend-onnx")
DTYPES = ("float32", "float16", "bfloat16")
PROMPT_SETS = ("demo", "demo-heldout", "images", "videos")
FAMILIES = (
    "sd3", "opensora", "opensora-plan", "flux", "flux2", "wan", "hunyuanvideo", "hunyuanvideo15", "qwenimage", "pixart",
    "sana", "cogvideox", "ltx", "ltx2", "sdxl",
)  # fmt: skip
