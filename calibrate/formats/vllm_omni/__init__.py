"""Format `vllm-omni`: the transformer directory of an 8-bit model for vLLM-Omni."""
