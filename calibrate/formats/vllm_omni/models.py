"""Lists the model classes that vLLM-Omni 0.30.0 can load with int8 layers, and for each class the layers that may be
int8. Importing this module needs no torch.

vLLM-Omni quantizes only some layers of some models. If another layer is int8 in the files, vLLM-Omni uses the codes as
float weights, or raises a KeyError for the scale. vLLM-Omni joins some layers of diffusers to one layer, such as the
projections to queries, keys and values. Layers that are joined must all be int8, or all float.
"""

from ..native import NativeModel, patterns

_QKV, _ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
_JOIN_QKV, _JOIN_ADDED = (r"\.to_[qkv]$", ".to_qkv"), (r"\.add_[qkv]_proj$", ".add_kv_proj")
_BOTH_STREAMS = (*_QKV, *_ADDED, "to_out.0", "to_add_out")
_MLP = ("net.0.proj", "net.2")

MODELS = {
    "QwenImageTransformer2DModel": NativeModel(
        (
            *patterns("transformer_blocks.*.attn", _BOTH_STREAMS),
            *patterns("transformer_blocks.*.img_mlp", _MLP),
            *patterns("transformer_blocks.*.txt_mlp", _MLP),
        ),
        (_JOIN_QKV, _JOIN_ADDED),
    ),
    "FluxTransformer2DModel": NativeModel(
        (
            *patterns("single_transformer_blocks.*.attn", _QKV),
            *patterns("single_transformer_blocks.*", ("proj_mlp", "proj_out")),
        ),
        (_JOIN_QKV,),
    ),
    "Flux2Transformer2DModel": NativeModel(
        (
            *patterns("transformer_blocks.*.attn", _BOTH_STREAMS),
            *patterns("transformer_blocks.*.ff", ("linear_in", "linear_out")),
            *patterns("transformer_blocks.*.ff_context", ("linear_in", "linear_out")),
            *patterns("single_transformer_blocks.*.attn", ("to_qkv_mlp_proj", "to_out")),
        ),
        (_JOIN_QKV, _JOIN_ADDED),
    ),
    "WanTransformer3DModel": NativeModel(
        (
            *patterns("blocks.*.attn1", (*_QKV, "to_out.0")),
            *patterns("blocks.*.attn2", (*_QKV, "to_out.0", "add_k_proj", "add_v_proj")),
            *patterns("blocks.*.ffn", _MLP),
        ),
        (
            (r"\.attn1\.to_[qkv]$", ".attn1.to_qkv"),
            (r"\.to_out\.0$", ".to_out"),
            (r"\.ffn\.net\.0\.proj$", ".ffn.net_0.proj"),
            (r"\.ffn\.net\.2$", ".ffn.net_2"),
        ),
    ),
    "ZImageTransformer2DModel": NativeModel(
        tuple(
            f"{stack}.*.{leaf}"
            for stack in ("layers", "noise_refiner", "context_refiner")
            for leaf in (
                *patterns("attention", (*_QKV, "to_out.0")),
                *patterns("feed_forward", ("w1", "w2", "w3")),
            )
        ),
        (_JOIN_QKV, (r"\.feed_forward\.w[13]$", ".feed_forward.w13")),
    ),
}

_FLOAT_ONLY = "vLLM-Omni does not pass the quantization_config to the layers of {}, so loading ends with a KeyError"
UNTHREADED = {
    name: _FLOAT_ONLY.format(name)
    for name in (
        "SD3Transformer2DModel", "SanaVideoTransformer3DModel", "SanaTransformer2DModel", "OvisImageTransformer2DModel",
        "LongCatImageTransformer2DModel", "StableAudioDiTModel",
    )
}  # fmt: skip
