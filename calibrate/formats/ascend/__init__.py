"""Format `ascend`: the files of msModelSlim, Ascend's tool for quantization. MindIE-SD, Ascend's library for diffusion
models, loads them."""
