"""Format `comfy`: one safetensors file with the model's native names, which ComfyUI loads as int8_tensorwise."""
