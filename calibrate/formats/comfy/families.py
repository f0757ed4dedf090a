"""The names that ComfyUI gives to the tensors of each model, as data: `FAMILIES`, by the model's class in diffusers.

A rule maps names in diffusers to a native name, the one in the files of the model's authors, which ComfyUI reads. The
key of a rule is the native name, its value the name in diffusers, or a tuple of names whose rows are concatenated. A
rule renames a tensor of exactly that name and all tensors below it: "time_in" also stands for "time_in.weight". Of
several rules for a name, the one with the longest name in diffusers counts. `{}` stands for the number of a block.
"""

from collections.abc import Mapping
from typing import NamedTuple

Rules = Mapping[str, str | tuple[str, ...]]


class Family(NamedTuple):
    """The native names of one model class.

    | field        | meaning                                                                                       |
    |--------------|-----------------------------------------------------------------------------------------------|
    | title        | name of the models, for messages                                                              |
    | rules        | dict from native name to the names in diffusers                                               |
    | native       | a tensor that every file with native names has                                                |
    | diffusers    | a tensor that every file with diffusers' names has, and none with native names                |
    | swapped      | native names of layers whose first and second half of rows are exchanged                      |
    | swapped_last | the same, for the last block only                                                             |
    | flags        | dict from a key of the model's config to the name of the empty tensor that stands for it      |
    """

    title: str
    rules: Rules
    native: str
    diffusers: str | None = None
    swapped: frozenset[str] = frozenset()
    swapped_last: frozenset[str] = frozenset()
    flags: Mapping[str, str] = {}


def _below(native: str, diffusers: str, rules: Rules) -> dict[str, str | tuple[str, ...]]:
    """Returns `rules` with the prefix `native` before their native names and `diffusers` before the others."""

    def prefixed(names: str | tuple[str, ...]) -> str | tuple[str, ...]:
        return f"{diffusers}{names}" if isinstance(names, str) else tuple(f"{diffusers}{name}" for name in names)

    return {f"{native}{name}": prefixed(names) for name, names in rules.items()}


def _same(*names: str) -> dict[str, str]:
    """Returns rules for names that are the same in diffusers."""
    return {name: name for name in names}


_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")

_SD3_BLOCK: Rules = {
    "x_block.adaLN_modulation.1": "norm1.linear",
    "x_block.attn.qkv": _QKV,
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.ln_q": "attn2.norm_q",
    "x_block.attn2.ln_k": "attn2.norm_k",
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
    "context_block.attn.qkv": _ADDED_QKV,
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}
_SD3 = Family(
    "Stable Diffusion 3 and 3.5",
    {
        "pos_embed": "pos_embed.pos_embed",
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        "context_embedder": "context_embedder",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
        "final_layer.linear": "proj_out",
    }
    | _below("joint_blocks.{}.", "transformer_blocks.{}.", _SD3_BLOCK),
    native="joint_blocks.0.context_block.attn.qkv.weight",
    diffusers="pos_embed.pos_embed",
    swapped=frozenset({"final_layer.adaLN_modulation.1"}),
    swapped_last=frozenset({"joint_blocks.{}.context_block.adaLN_modulation.1"}),
)

_FLUX_DOUBLE: Rules = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.qkv": _QKV,
    "txt_attn.qkv": _ADDED_QKV,
    "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
    "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
_FLUX_SINGLE: Rules = {
    "modulation.lin": "norm.linear",
    "linear1": (*_QKV, "proj_mlp"),
    "linear2": "proj_out",
    "norm.query_norm.scale": "attn.norm_q.weight",
    "norm.key_norm.scale": "attn.norm_k.weight",
}
_FLUX = Family(
    "Flux.1",
    {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
        "final_layer.linear": "proj_out",
    }
    | _below("double_blocks.{}.", "transformer_blocks.{}.", _FLUX_DOUBLE)
    | _below("single_blocks.{}.", "single_transformer_blocks.{}.", _FLUX_SINGLE),
    native="double_blocks.0.img_attn.norm.key_norm.scale",
    diffusers="single_transformer_blocks.0.proj_mlp.weight",
    swapped=frozenset({"final_layer.adaLN_modulation.1"}),
)

_QWEN_IMAGE = Family(
    "Qwen-Image",
    _same("time_text_embed", "txt_norm", "img_in", "txt_in", "transformer_blocks", "norm_out", "proj_out"),
    native="transformer_blocks.0.img_mod.1.weight",
    flags={"zero_cond_t": "__index_timestep_zero__"},
)

_LTX_NORMS: Rules = {f"attn{n}.{x}_norm": f"attn{n}.norm_{x}" for n in (1, 2) for x in "qk"}
_LTX = Family(
    "LTX-Video",
    {"patchify_proj": "proj_in", "adaln_single": "time_embed"}
    | _same("caption_projection", "transformer_blocks", "scale_shift_table", "proj_out")
    | _below("transformer_blocks.{}.", "transformer_blocks.{}.", _LTX_NORMS),
    native="patchify_proj.weight",
    diffusers="time_embed.emb.timestep_embedder.linear_1.weight",
)

_WAN_BLOCK: Rules = {
    "modulation": "scale_shift_table",
    "norm3": "norm2",
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
_WAN = Family(
    "Wan 2.1 and 2.2",
    {
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj",
        "text_embedding.0": "condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
        "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
        "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
        "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
        "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
        "head.modulation": "scale_shift_table",
        "head.head": "proj_out",
    }
    | _same("patch_embedding", "vace_patch_embedding")
    | _below("blocks.{}.", "blocks.{}.", _WAN_BLOCK)
    | _below("vace_blocks.{}.", "vace_blocks.{}.", {**_WAN_BLOCK, "before_proj": "proj_in", "after_proj": "proj_out"}),
    native="head.modulation",
    diffusers="condition_embedder.time_proj.weight",
)

_Z_IMAGE_BLOCK: Rules = {
    "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.q_norm": "attention.norm_q",
    "attention.k_norm": "attention.norm_k",
    "attention.out": "attention.to_out.0",
}
_Z_IMAGE = Family(
    "Z-Image",
    {"x_embedder": "all_x_embedder.2-1", "final_layer": "all_final_layer.2-1"}
    | _same("t_embedder", "cap_embedder", "x_pad_token", "cap_pad_token", "layers", "noise_refiner", "context_refiner")
    | _below("layers.{}.", "layers.{}.", _Z_IMAGE_BLOCK)
    | _below("noise_refiner.{}.", "noise_refiner.{}.", _Z_IMAGE_BLOCK)
    | _below("context_refiner.{}.", "context_refiner.{}.", _Z_IMAGE_BLOCK),
    native="x_pad_token",
    diffusers="all_x_embedder.2-1.weight",
)

FAMILIES: dict[str, Family] = {
    "QwenImageTransformer2DModel": _QWEN_IMAGE,
    "LTXVideoTransformer3DModel": _LTX,
    "FluxTransformer2DModel": _FLUX,
    "SD3Transformer2DModel": _SD3,
    "WanTransformer3DModel": _WAN,
    "WanVACETransformer3DModel": _WAN,
    "ZImageTransformer2DModel": _Z_IMAGE,
}
