"""Lists, for models that draw pictures, the native names of their tensors, which ComfyUI reads. Each model has a
`Family`, a table of these names."""

from .family import Family, Rules, below, same

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
SD3 = Family(
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
    | below("joint_blocks.{}.", "transformer_blocks.{}.", _SD3_BLOCK),
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
FLUX = Family(
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
    | below("double_blocks.{}.", "transformer_blocks.{}.", _FLUX_DOUBLE)
    | below("single_blocks.{}.", "single_transformer_blocks.{}.", _FLUX_SINGLE),
    native="double_blocks.0.img_mod.lin.weight",
    diffusers="single_transformer_blocks.0.norm.linear.weight",
    swapped=frozenset({"final_layer.adaLN_modulation.1"}),
)

QWEN_IMAGE = Family(
    "Qwen-Image",
    same("time_text_embed", "txt_norm", "img_in", "txt_in", "transformer_blocks", "norm_out", "proj_out"),
    native="transformer_blocks.0.img_mod.1.weight",
    flags={"zero_cond_t": "__index_timestep_zero__"},
)

_Z_IMAGE_BLOCK: Rules = {
    "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.q_norm": "attention.norm_q",
    "attention.k_norm": "attention.norm_k",
    "attention.out": "attention.to_out.0",
}
Z_IMAGE = Family(
    "Z-Image",
    {"x_embedder": "all_x_embedder.2-1", "final_layer": "all_final_layer.2-1"}
    | same("t_embedder", "cap_embedder", "siglip_embedder", "x_pad_token", "cap_pad_token", "siglip_pad_token")
    | same("layers", "noise_refiner", "context_refiner", "siglip_refiner")
    | below("layers.{}.", "layers.{}.", _Z_IMAGE_BLOCK)
    | below("noise_refiner.{}.", "noise_refiner.{}.", _Z_IMAGE_BLOCK)
    | below("context_refiner.{}.", "context_refiner.{}.", _Z_IMAGE_BLOCK)
    | below("siglip_refiner.{}.", "siglip_refiner.{}.", _Z_IMAGE_BLOCK),
    native="x_pad_token",
    diffusers="all_x_embedder.2-1.weight",
    only={"all_patch_size": (2,), "all_f_patch_size": (1,)},
)

_FLUX2_DOUBLE: Rules = {
    "img_attn.qkv": _QKV,
    "txt_attn.qkv": _ADDED_QKV,
    "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
    "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}
_FLUX2_SINGLE: Rules = {
    "linear1": "attn.to_qkv_mlp_proj",
    "linear2": "attn.to_out",
    "norm.query_norm.scale": "attn.norm_q.weight",
    "norm.key_norm.scale": "attn.norm_k.weight",
}
FLUX2 = Family(
    "Flux.2",
    {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
        "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
        "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
        "single_stream_modulation.lin": "single_stream_modulation.linear",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
        "final_layer.linear": "proj_out",
    }
    | below("double_blocks.{}.", "transformer_blocks.{}.", _FLUX2_DOUBLE)
    | below("single_blocks.{}.", "single_transformer_blocks.{}.", _FLUX2_SINGLE),
    native="double_stream_modulation_img.lin.weight",
    diffusers="double_stream_modulation_img.linear.weight",
    swapped=frozenset({"final_layer.adaLN_modulation.1"}),
)

_CHROMA_GUIDANCE: Rules = {
    "layers.{}.in_layer": "layers.{}.linear_1",
    "layers.{}.out_layer": "layers.{}.linear_2",
    "norms.{}.scale": "norms.{}.weight",
    "in_proj": "in_proj",
    "out_proj": "out_proj",
}
CHROMA = Family(
    "Chroma",
    {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}
    | below("distilled_guidance_layer.", "distilled_guidance_layer.", _CHROMA_GUIDANCE)
    | below("double_blocks.{}.", "transformer_blocks.{}.", _FLUX_DOUBLE)
    | below("single_blocks.{}.", "single_transformer_blocks.{}.", _FLUX_SINGLE),
    native="distilled_guidance_layer.norms.0.scale",
    diffusers="distilled_guidance_layer.norms.0.weight",
)

_AURAFLOW_FF: Rules = {"c_fc1": "linear_1", "c_fc2": "linear_2", "c_proj": "out_projection"}
_AURAFLOW_DOUBLE: Rules = {
    "modX.1": "norm1.linear",
    "modC.1": "norm1_context.linear",
    "attn.w2q": "attn.to_q",
    "attn.w2k": "attn.to_k",
    "attn.w2v": "attn.to_v",
    "attn.w2o": "attn.to_out.0",
    "attn.w1q": "attn.add_q_proj",
    "attn.w1k": "attn.add_k_proj",
    "attn.w1v": "attn.add_v_proj",
    "attn.w1o": "attn.to_add_out",
    **below("mlpX.", "ff.", _AURAFLOW_FF),
    **below("mlpC.", "ff_context.", _AURAFLOW_FF),
}
_AURAFLOW_SINGLE: Rules = {
    "modCX.1": "norm1.linear",
    "attn.w1q": "attn.to_q",
    "attn.w1k": "attn.to_k",
    "attn.w1v": "attn.to_v",
    "attn.w1o": "attn.to_out.0",
    **below("mlp.", "ff.", _AURAFLOW_FF),
}
AURAFLOW = Family(
    "AuraFlow",
    {
        "register_tokens": "register_tokens",
        "positional_encoding": "pos_embed.pos_embed",
        "init_x_linear": "pos_embed.proj",
        "cond_seq_linear": "context_embedder",
        "t_embedder.mlp.0": "time_step_proj.linear_1",
        "t_embedder.mlp.2": "time_step_proj.linear_2",
        "modF.1": "norm_out.linear",
        "final_linear": "proj_out",
    }
    | below("double_layers.{}.", "joint_transformer_blocks.{}.", _AURAFLOW_DOUBLE)
    | below("single_layers.{}.", "single_transformer_blocks.{}.", _AURAFLOW_SINGLE),
    native="positional_encoding",
    diffusers="joint_transformer_blocks.0.attn.to_q.weight",
    swapped=frozenset({"modF.1"}),
)

_KREA2_BLOCK: Rules = {
    "attn.wq": "attn.to_q",
    "attn.wk": "attn.to_k",
    "attn.wv": "attn.to_v",
    "attn.wo": "attn.to_out.0",
    "attn.gate": "attn.to_gate",
    "attn.qknorm.qnorm.scale": "attn.norm_q.weight",
    "attn.qknorm.knorm.scale": "attn.norm_k.weight",
    "mlp": "ff",
    "prenorm.scale": "norm1.weight",
    "postnorm.scale": "norm2.weight",
    "mod.lin": "scale_shift_table",
}
KREA2 = Family(
    "Krea 2",
    {
        "first": "img_in",
        "tmlp.0": "time_embed.linear_1",
        "tmlp.2": "time_embed.linear_2",
        "tproj.1": "time_mod_proj",
        "txtmlp.0.scale": "txt_in.norm.weight",
        "txtmlp.1": "txt_in.linear_1",
        "txtmlp.3": "txt_in.linear_2",
        "txtfusion.projector": "text_fusion.projector",
        "last.linear": "final_layer.linear",
        "last.norm.scale": "final_layer.norm.weight",
        "last.modulation.lin": "final_layer.scale_shift_table",
    }
    | below("blocks.{}.", "transformer_blocks.{}.", _KREA2_BLOCK)
    | below("txtfusion.layerwise_blocks.{}.", "text_fusion.layerwise_blocks.{}.", _KREA2_BLOCK)
    | below("txtfusion.refiner_blocks.{}.", "text_fusion.refiner_blocks.{}.", _KREA2_BLOCK),
    native="last.modulation.lin",
    diffusers="final_layer.scale_shift_table",
    flat=frozenset({"blocks.{}.mod.lin"}),
)

QWEN_IMAGE_21 = Family(
    "Qwen-Image-2.1",
    same("time_text_embed", "txt_in", "img_in", "modulation", "transformer_blocks", "norm_out", "proj_out")
    | below(
        "transformer_blocks.{}.img_mlp.",
        "transformer_blocks.{}.img_mlp.",
        {"gate_up": ("gate_layer", "proj")},
    ),
    native="transformer_blocks.0.img_mlp.gate_up.weight",
    diffusers="transformer_blocks.0.img_mlp.gate_layer.weight",
)
