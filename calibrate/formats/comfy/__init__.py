"""Format `comfy`: one safetensors file, which ComfyUI loads with its quantization `int8_tensorwise`. The tensors have
the native names, those that the authors of the model use."""
