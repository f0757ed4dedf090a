"""Lists the model classes that vLLM-Omni 0.30.0 and SGLang-diffusion 0.5.23 compute in FP8 from a ModelOpt checkpoint,
and for each class the layers that they can hold in FP8. Importing this module needs no torch.

Both programs have names of their own for some layers. Layers to which a program gives the same name are one layer in
it, such as the projections to queries, keys and values. Both pass any quantization_config to the same layers. So the
layers listed are those that vLLM-Omni can hold in int8, and those that SGLang can hold in int8 on Ascend.
"""

import re
from collections.abc import Collection
from dataclasses import replace

from ...layers.schemes import FP8_STATIC
from ..native import NativeModel
from ..sglang.models import MODELS as SGLANG_INT8
from ..sglang.models import UNTHREADED as _SGLANG_UNTHREADED
from ..vllm_omni.models import MODELS as VLLM_OMNI
from ..vllm_omni.models import UNTHREADED as _VLLM_UNTHREADED

QWEN_IMAGE, FLUX2, Z_IMAGE = "QwenImageTransformer2DModel", "Flux2Transformer2DModel", "ZImageTransformer2DModel"
_JOINED = ((r"\.to_[qkv]$", ".to_qkv"), (r"\.add_[qkv]_proj$", ".to_added_qkv"))

SGLANG = SGLANG_INT8 | {
    QWEN_IMAGE: replace(SGLANG_INT8[QWEN_IMAGE], renamed=(*_JOINED, *SGLANG_INT8[QWEN_IMAGE].renamed)),
    Z_IMAGE: VLLM_OMNI[Z_IMAGE],
}
# model classes in which SGLang joins further layers on GPUs of compute capability 10.0 and later
_SGLANG_NEWER = {FLUX2: replace(SGLANG_INT8[FLUX2], renamed=_JOINED)}
# last parts of the names of joined layers that SGLang also recognizes as ignored by the names of all their members
PACKED = {
    QWEN_IMAGE: (".to_qkv", ".to_added_qkv"),
    FLUX2: (".to_qkv", ".to_added_qkv"),
    Z_IMAGE: (".w13",),
}

# layers whose scales vLLM-Omni finds only under its own name of the layer, since its ModelOpt adapter does not know the
# names of diffusers
_VLLM_OWN_SCALES = re.compile(r"\.ffn\.net\.(0\.proj|2)$")

_UNUSED = (
    "neither vLLM-Omni nor SGLang passes the quantization_config to the layers of {}, so none would compute in FP8"
)
UNTHREADED = {name: _UNUSED.format(name) for name in (*_VLLM_UNTHREADED, *_SGLANG_UNTHREADED) if name not in VLLM_OMNI}


def sglang_joined(kind: str) -> NativeModel:
    """Returns the model class `kind` of SGLang, in which layers are joined that SGLang joins on any GPU. Some of them
    it joins only on GPUs of compute capability 10.0 and later."""
    return _SGLANG_NEWER.get(kind, SGLANG[kind])


def vllm_scale_owner(kind: str, name: str) -> str:
    """Returns the name of the layer under which vLLM-Omni finds the scales of the layer that diffusers calls `name`, in
    the model class `kind`: the same name, except for the feed-forward layers of Wan."""
    return VLLM_OMNI[kind].name(name) if kind in VLLM_OMNI and _VLLM_OWN_SCALES.search(name) else name


def consumers(kind: str, scheme: str) -> tuple[NativeModel, ...]:
    """Returns the model class `kind` in each of the consumers that checkpoints of `scheme` are written for: vLLM-Omni,
    and for static layers SGLang too. SGLang finds the scales of Z-Image only under names that vLLM-Omni refuses, so
    Z-Image is written for vLLM-Omni alone."""
    if scheme != FP8_STATIC or kind == Z_IMAGE:
        return (VLLM_OMNI[kind],)
    return (VLLM_OMNI[kind], SGLANG[kind], sglang_joined(kind))


def written(models: Collection[NativeModel], names: Collection[str], linears: Collection[str]) -> set[str]:
    """Returns the names of the layers that are written in FP8: those of `names` that at least one of the consumers'
    `models` can hold in FP8, except layers that one of them joins with a float layer. `linears` are the names of all
    linear layers."""
    chosen = {name for name in names if any(model.holds(name) for model in models)}
    groups = [group for model in models for group in model.joined(linears).values()]
    count = -1
    while len(chosen) != count:  # a layer that stays float may keep others float in another consumer
        count = len(chosen)
        for group in groups:
            if not chosen.issuperset(group):
                chosen.difference_update(group)
    return chosen
