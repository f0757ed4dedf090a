"""Tiny pipelines that draw pictures with a transformer."""

from typing import Any

import diffusers as d
from PIL import Image

from .parts import PipelineCase, autoencoder, built, flow, image, ones, prompts, randn

SIZE = {"height": 16, "width": 16, "num_inference_steps": 2}


def guider() -> Any:
    """Returns the object for classifier-free guidance that some pipelines have as a component."""
    from diffusers.guiders import ClassifierFreeGuidance

    return ClassifierFreeGuidance(guidance_scale=3.0)


def sd3_parts(channels: int = 4, **config: Any) -> dict[str, Any]:
    transformer = d.SD3Transformer2DModel(
        sample_size=8, in_channels=channels, out_channels=channels, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=16,
        pos_embed_max_size=8, **config,
    )  # fmt: skip
    return dict(transformer=transformer, vae=autoencoder(channels, shift_factor=0.0), scheduler=flow())


SD3_PROMPTS = prompts(1, 7, 64) | {
    "pooled_prompt_embeds": randn(1, 16), "negative_pooled_prompt_embeds": randn(1, 16) * 0.5
}  # fmt: skip


def sd35() -> PipelineCase:
    parts = sd3_parts(qk_norm="rms_norm", dual_attention_layers=(0,))
    return built("StableDiffusion3Pipeline", **parts), SD3_PROMPTS | SIZE


def sd3_image() -> PipelineCase:
    return built("StableDiffusion3Img2ImgPipeline", **sd3_parts()), SD3_PROMPTS | SIZE | {"image": image()}


def sd3_inpaint() -> PipelineCase:
    arguments = SD3_PROMPTS | SIZE | {"image": image(), "mask_image": ones(1, 1, 16, 16).float()}
    return built("StableDiffusion3InpaintPipeline", **sd3_parts(16)), arguments


def sd3_pag() -> PipelineCase:
    pipe = built("StableDiffusion3PAGPipeline", **sd3_parts(), pag_applied_layers=["blocks.0"])
    return pipe, SD3_PROMPTS | SIZE | {"pag_scale": 0.7}


def sd3_controlnet() -> PipelineCase:
    net = d.SD3ControlNetModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=16, pos_embed_max_size=8,
    )  # fmt: skip
    pipe = built("StableDiffusion3ControlNetPipeline", **sd3_parts(), controlnet=net)
    return pipe, SD3_PROMPTS | SIZE | {"control_image": image(), "controlnet_conditioning_scale": 0.5}


def flux_parts(**config: Any) -> dict[str, Any]:
    transformer = d.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), **config,
    )  # fmt: skip
    return dict(transformer=transformer, vae=autoencoder(1, shift_factor=0.0), scheduler=flow())


FLUX_PROMPTS = {"prompt_embeds": randn(1, 6, 32), "pooled_prompt_embeds": randn(1, 16), "max_sequence_length": 6}


def flux_dev() -> PipelineCase:
    return built("FluxPipeline", **flux_parts(guidance_embeds=True)), FLUX_PROMPTS | SIZE


def flux_image() -> PipelineCase:
    return built("FluxImg2ImgPipeline", **flux_parts()), FLUX_PROMPTS | SIZE | {"image": image()}


def flux_controlnet() -> PipelineCase:
    net = d.FluxControlNetModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    pipe = built("FluxControlNetPipeline", **flux_parts(), controlnet=net)
    return pipe, FLUX_PROMPTS | SIZE | {"control_image": image()}


def flux2() -> PipelineCase:
    transformer = d.Flux2Transformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    vae = d.AutoencoderKLFlux2(
        block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        norm_num_groups=4, latent_channels=1, layers_per_block=1, sample_size=16,
    )  # fmt: skip
    pipe = built("Flux2KleinPipeline", transformer=transformer, vae=vae, scheduler=flow(), is_distilled=False)
    return pipe, prompts(1, 6, 16) | SIZE


def flux2_cached() -> PipelineCase:
    """Builds a pipeline that passes its transformer a live cache, which no file can hold."""
    pipe, _ = flux2()
    parts = {name: pipe.components[name] for name in ("transformer", "vae", "scheduler")}
    arguments = {"prompt_embeds": randn(1, 6, 16), **SIZE, "image": Image.new("RGB", (64, 64), "teal")}
    return built("Flux2KleinKVPipeline", **parts), arguments


def chroma() -> PipelineCase:
    transformer = d.ChromaTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 4, 8), approximator_num_channels=8, approximator_hidden_dim=16,
        approximator_layers=1,
    )  # fmt: skip
    pipe = built("ChromaPipeline", transformer=transformer, vae=autoencoder(1, shift_factor=0.0), scheduler=flow())
    masks = {"prompt_attention_mask": ones(1, 6).bool(), "negative_prompt_attention_mask": ones(1, 6).bool()}
    return pipe, prompts(1, 6, 32, length=6) | masks | SIZE


def auraflow() -> PipelineCase:
    transformer = d.AuraFlowTransformer2DModel(
        sample_size=8, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pos_embed_max_size=64,
    )  # fmt: skip
    pipe = built("AuraFlowPipeline", transformer=transformer, vae=autoencoder(), scheduler=flow())
    return pipe, prompts(1, 6, 32, masked=True) | SIZE


def pixart_parts(**config: Any) -> dict[str, Any]:
    transformer = d.PixArtTransformer2DModel(
        sample_size=8, num_layers=2, attention_head_dim=8, num_attention_heads=3, caption_channels=16,
        cross_attention_dim=24, **config,
    )  # fmt: skip
    return dict(transformer=transformer, vae=autoencoder(), scheduler=d.DPMSolverMultistepScheduler())


PIXART = prompts(1, 6, 16, masked=True) | SIZE | {"negative_prompt": None, "use_resolution_binning": False}


def pixart_alpha() -> PipelineCase:
    return built("PixArtAlphaPipeline", **pixart_parts()), PIXART


def pixart_sigma() -> PipelineCase:
    return built("PixArtSigmaPipeline", **pixart_parts()), PIXART


def pixart_pag() -> PipelineCase:
    pipe = built("PixArtSigmaPAGPipeline", **pixart_parts(), pag_applied_layers=["blocks.1"])
    return pipe, PIXART | {"pag_scale": 2.0}


def hunyuan_dit() -> PipelineCase:
    transformer = d.HunyuanDiT2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        hidden_size=16, cross_attention_dim=16, cross_attention_dim_t5=16, pooled_projection_dim=16, text_len=6,
        text_len_t5=6,
    )  # fmt: skip
    pipe = built("HunyuanDiTPipeline", transformer=transformer, vae=autoencoder(), scheduler=d.DDPMScheduler())
    embeds = prompts(1, 6, 16, masked=True)
    return pipe, embeds | {f"{name}_2": value for name, value in embeds.items()} | SIZE | {
        "use_resolution_binning": False
    }


def qwen_image() -> PipelineCase:
    transformer = d.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    vae = d.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    masks = {"prompt_embeds_mask": ones(1, 6), "negative_prompt_embeds_mask": ones(1, 6)}
    pipe = built("QwenImagePipeline", transformer=transformer, vae=vae, scheduler=flow())
    return pipe, prompts(1, 6, 16) | masks | SIZE | {"true_cfg_scale": 2.0}


def cogview4() -> PipelineCase:
    transformer = d.CogView4Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=4, num_attention_heads=4, text_embed_dim=32,
        time_embed_dim=8, condition_dim=4, sample_size=8, rope_axes_dim=(8, 8), pos_embed_max_size=8,
    )  # fmt: skip
    pipe = built("CogView4Pipeline", transformer=transformer, vae=autoencoder(), scheduler=flow())
    return pipe, prompts(1, 6, 32) | SIZE


def cogview3() -> PipelineCase:
    transformer = d.CogView3PlusTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=2, text_embed_dim=32,
        time_embed_dim=8, condition_dim=2, pos_embed_max_size=8, sample_size=8,
    )  # fmt: skip
    pipe = built(
        "CogView3PlusPipeline", transformer=transformer, vae=autoencoder(), scheduler=d.CogVideoXDDIMScheduler()
    )
    return pipe, prompts(1, 6, 32) | SIZE


def lumina2() -> PipelineCase:
    transformer = d.Lumina2Transformer2DModel(
        sample_size=4, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1, num_attention_heads=3,
        num_kv_heads=1, multiple_of=2, ffn_dim_multiplier=2, axes_dim_rope=(4, 2, 2), axes_lens=(128, 128, 128),
        cap_feat_dim=16,
    )  # fmt: skip
    pipe = built("Lumina2Pipeline", transformer=transformer, vae=autoencoder(shift_factor=0.0), scheduler=flow())
    return pipe, prompts(1, 6, 16, masked=True) | SIZE


def z_image() -> PipelineCase:
    transformer = d.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    pipe = built("ZImagePipeline", transformer=transformer, vae=autoencoder(shift_factor=0.0), scheduler=flow())
    return pipe, {"prompt_embeds": [randn(6, 16)], "negative_prompt_embeds": [randn(5, 16)], **SIZE}


def ovis() -> PipelineCase:
    transformer = d.OvisImageTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    pipe = built("OvisImagePipeline", transformer=transformer, vae=autoencoder(1, shift_factor=0.0), scheduler=flow())
    return pipe, prompts(1, 6, 32) | SIZE | {"negative_prompt": None}


def bria() -> PipelineCase:
    transformer = d.BriaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=[0, 4, 4],
    )  # fmt: skip
    pipe = built("BriaPipeline", transformer=transformer, vae=autoencoder(shift_factor=0.0), scheduler=flow())
    return pipe, prompts(1, 6, 32) | SIZE


def krea2() -> PipelineCase:
    transformer = d.Krea2Transformer2DModel(
        in_channels=16, num_layers=1, attention_head_dim=16, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, timestep_embed_dim=32, text_hidden_dim=16, num_text_layers=2, text_num_attention_heads=2,
        text_num_key_value_heads=2, text_intermediate_size=32, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    vae = d.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    masks = {"prompt_embeds_mask": ones(1, 6).bool(), "negative_prompt_embeds_mask": ones(1, 6).bool()}
    pipe = built("Krea2Pipeline", transformer=transformer, vae=vae, scheduler=flow(), text_encoder_select_layers=(0, 1))
    return pipe, prompts(1, 6, 2, 16) | masks | SIZE


def hidream() -> PipelineCase:
    transformer = d.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_channels=[32, 16], text_emb_dim=64, num_routed_experts=4,
        num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(32, 32), llama_layers=(0, 1),
        force_inference_output=True,
    )  # fmt: skip
    pipe = built("HiDreamImagePipeline", transformer=transformer, vae=autoencoder(shift_factor=0.0), scheduler=flow())
    pipe.default_sample_size = 8  # the pipeline resizes pictures to this area
    embeds = {"prompt_embeds_t5": randn(1, 6, 32), "prompt_embeds_llama3": randn(2, 1, 6, 16)}
    negative = {f"negative_{name}": value * 0.5 for name, value in embeds.items()}
    pooled = {"pooled_prompt_embeds": randn(1, 64), "negative_pooled_prompt_embeds": randn(1, 64) * 0.5}
    return pipe, embeds | negative | pooled | SIZE


def hunyuan_image() -> PipelineCase:
    transformer = d.HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, text_embed_dim=16, text_embed_2_dim=16, rope_axes_dim=(4, 4), guidance_embeds=False,
    )  # fmt: skip
    vae = d.AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        spatial_compression_ratio=2, sample_size=16, downsample_match_channel=False, upsample_match_channel=False,
    )  # fmt: skip
    pipe = built("HunyuanImagePipeline", transformer=transformer, vae=vae, scheduler=flow(), guider=guider())
    embeds = prompts(1, 6, 16) | {"prompt_embeds_mask": ones(1, 6), "negative_prompt_embeds_mask": ones(1, 6)}
    return pipe, embeds | {f"{name}_2": value for name, value in embeds.items()} | SIZE


def lumina() -> PipelineCase:
    transformer = d.LuminaNextDiT2DModel(
        sample_size=4, in_channels=4, hidden_size=24, num_layers=2, num_attention_heads=3, num_kv_heads=1,
        multiple_of=16, ffn_dim_multiplier=None, cross_attention_dim=16, learn_sigma=True,
    )  # fmt: skip
    pipe = built("LuminaPipeline", transformer=transformer, vae=autoencoder(), scheduler=flow())
    return pipe, prompts(1, 6, 16, masked=True) | SIZE | {"height": 32, "width": 32}


def prx() -> PipelineCase:
    transformer = d.PRXTransformer2DModel(
        in_channels=4, patch_size=1, context_in_dim=8, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=2,
        axes_dim=[4, 4],
    )  # fmt: skip
    pipe = built("PRXPipeline", transformer=transformer, vae=autoencoder(), scheduler=flow())
    masks = {"prompt_attention_mask": ones(1, 6).bool(), "negative_prompt_attention_mask": ones(1, 6).bool()}
    return pipe, prompts(1, 6, 8) | masks | SIZE | {"use_resolution_binning": False}


def dit() -> PipelineCase:
    transformer = d.DiTTransformer2DModel(
        sample_size=8, num_layers=2, attention_head_dim=8, num_attention_heads=2, out_channels=8
    )
    pipe = built("DiTPipeline", transformer=transformer, vae=autoencoder(), scheduler=d.DDIMScheduler())
    return pipe, {"class_labels": [1], "num_inference_steps": 2}


IMAGES = {
    "sd35": sd35, "sd3-image": sd3_image, "sd3-inpaint": sd3_inpaint, "sd3-pag": sd3_pag,
    "sd3-controlnet": sd3_controlnet, "flux-dev": flux_dev, "flux-image": flux_image,
    "flux-controlnet": flux_controlnet, "flux2": flux2, "chroma": chroma, "auraflow": auraflow,
    "pixart-alpha": pixart_alpha, "pixart-sigma": pixart_sigma, "pixart-pag": pixart_pag, "hunyuan-dit": hunyuan_dit,
    "qwen-image": qwen_image, "cogview4": cogview4, "cogview3": cogview3, "lumina2": lumina2, "z-image": z_image,
    "ovis": ovis, "bria": bria, "krea2": krea2, "dit": dit,
    "hidream": hidream, "hunyuan-image": hunyuan_image, "lumina": lumina, "prx": prx,
}  # fmt: skip
