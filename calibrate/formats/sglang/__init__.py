"""Format `sglang`: a transformer directory for SGLang-diffusion on an Ascend NPU, in the layout of msModelSlim."""
