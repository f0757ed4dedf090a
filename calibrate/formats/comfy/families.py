"""Defines FAMILIES, a dict from the name of a model's class in diffusers to its `Family`, a table of the native names
of its tensors, which ComfyUI reads."""

from .family import Family
from .image_families import AURAFLOW, CHROMA, FLUX, FLUX2, KREA2, QWEN_IMAGE, QWEN_IMAGE_21, SD3, Z_IMAGE
from .video_families import LTX, WAN

# AuraFlow stands before SD3, whose tensor `diffusers` it has too
FAMILIES: dict[str, Family] = {
    "QwenImageTransformer2DModel": QWEN_IMAGE,
    "QwenImage21Transformer2DModel": QWEN_IMAGE_21,
    "FluxTransformer2DModel": FLUX,
    "Flux2Transformer2DModel": FLUX2,
    "AuraFlowTransformer2DModel": AURAFLOW,
    "SD3Transformer2DModel": SD3,
    "ZImageTransformer2DModel": Z_IMAGE,
    "Krea2Transformer2DModel": KREA2,
    "ChromaTransformer2DModel": CHROMA,
    "LTXVideoTransformer3DModel": LTX,
    "WanTransformer3DModel": WAN,
    "WanVACETransformer3DModel": WAN,
}
