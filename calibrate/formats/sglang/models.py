"""Lists the model classes that SGLang-diffusion 0.5.23 can load with int8 layers, and for each class the layers that
may be int8. Importing this module needs no torch.

SGLang has its own names for some layers. SGLang looks up each layer that may be int8, by SGLang's name of the layer, in
the description (the JSON file that gives the scheme of each tensor), and raises an error if the name is missing. If a
layer that must be float is int8 in the files, SGLang only warns, and uses the codes as bfloat16 weights. In SGLang's
Flux, the feed-forward layers of the double blocks must be float.
"""

from ..native import NativeModel, patterns

_QKV, _ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
_BOTH_STREAMS = (*_QKV, *_ADDED, "to_out.0", "to_add_out")
_MLP = ("net.0.proj", "net.2")

MODELS = {
    "QwenImageTransformer2DModel": NativeModel(
        (
            *("img_in", "txt_in", "proj_out"),
            *patterns("transformer_blocks.*", ("img_mod.1", "txt_mod.1")),
            *patterns("transformer_blocks.*.attn", _BOTH_STREAMS),
            *patterns("transformer_blocks.*.img_mlp", _MLP),
            *patterns("transformer_blocks.*.txt_mlp", _MLP),
        ),
        ((r"\.(img|txt)_mod\.1$", r".\1_mod"),),
    ),
    "FluxTransformer2DModel": NativeModel(
        (
            *patterns("transformer_blocks.*.attn", _BOTH_STREAMS),
            *patterns("single_transformer_blocks.*.attn", _QKV),
            *patterns("single_transformer_blocks.*", ("proj_mlp", "proj_out")),
        ),
    ),
    "Flux2Transformer2DModel": NativeModel(
        (
            "proj_out",
            *patterns("transformer_blocks.*.attn", _BOTH_STREAMS),
            *patterns("transformer_blocks.*.ff", ("linear_in", "linear_out")),
            *patterns("transformer_blocks.*.ff_context", ("linear_in", "linear_out")),
            *patterns("single_transformer_blocks.*.attn", ("to_qkv_mlp_proj", "to_out")),
        ),
    ),
    "WanTransformer3DModel": NativeModel(
        (
            "proj_out",
            *patterns("blocks.*.attn1", (*_QKV, "to_out.0")),
            *patterns("blocks.*.attn2", (*_QKV, "to_out.0", "add_k_proj", "add_v_proj")),
            *patterns("blocks.*.ffn", _MLP),
        ),
        (
            (r"\.attn1\.to_([qkv])$", r".to_\1"),
            (r"\.attn1\.to_out\.0$", ".to_out"),
            (r"\.attn2\.to_out\.0$", ".attn2.to_out"),
            (r"\.ffn\.net\.0\.proj$", ".ffn.fc_in"),
            (r"\.ffn\.net\.2$", ".ffn.fc_out"),
        ),
    ),
}
# model classes whose integer layers SGLang also finds by their names in diffusers
REVERSED = frozenset({"WanTransformer3DModel"})

_UNUSED = "SGLang's {} takes a description and never uses it: integers become bfloat16 weights, with warnings only"
UNTHREADED = {
    name: _UNUSED.format(name)
    for name in ("SD3Transformer2DModel", "SanaTransformer2DModel", "SanaVideoTransformer3DModel")
} | {
    "ZImageTransformer2DModel": "SGLang joins to_q, to_k and to_v of ZImageTransformer2DModel, and finds no scales for "
    "the joined layer"
}
