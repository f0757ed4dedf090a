"""Lists, for models that make videos, the native names of their tensors, which ComfyUI reads. Each model has a
`Family`, a table of these names."""

from .family import Family, Rules, below, same

_LTX_NORMS: Rules = {f"attn{n}.{x}_norm": f"attn{n}.norm_{x}" for n in (1, 2) for x in "qk"}
LTX = Family(
    "LTX-Video",
    {"patchify_proj": "proj_in", "adaln_single": "time_embed"}
    | same("caption_projection", "transformer_blocks", "scale_shift_table", "proj_out")
    | below("transformer_blocks.{}.", "transformer_blocks.{}.", _LTX_NORMS),
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
WAN = Family(
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
    | same("patch_embedding", "vace_patch_embedding")
    | below("blocks.{}.", "blocks.{}.", _WAN_BLOCK)
    | below("vace_blocks.{}.", "vace_blocks.{}.", {**_WAN_BLOCK, "before_proj": "proj_in", "after_proj": "proj_out"}),
    native="head.modulation",
    diffusers="condition_embedder.time_proj.weight",
)
