"""Format `comfy`: one safetensors file, which ComfyUI loads with its quantizations `int8_tensorwise`, `float8_e4m3fn`
and `mxfp8`. The tensors have native names: the names that the authors of the model use."""
