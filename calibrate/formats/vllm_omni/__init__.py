"""Format `vllm-omni`: the transformer directory of an int8 model for vLLM-Omni."""
