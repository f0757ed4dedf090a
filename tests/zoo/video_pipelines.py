"""Tiny pipelines that make videos, with random weights."""

from typing import Any

import diffusers as d
import torch

from .image_pipelines import guider
from .parts import PipelineCase, autoencoder, built, flow, image, ones, prompts, randn, wan_vae

SIZE = {"height": 16, "width": 16, "num_frames": 5, "num_inference_steps": 2}
WAN = dict(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, out_channels=16, text_dim=32, freq_dim=256,
    ffn_dim=32, num_layers=2, rope_max_seq_len=32,
)  # fmt: skip


def wan_parts(model: Any, **config: Any) -> dict[str, Any]:
    return dict(transformer=model(**WAN | config), vae=wan_vae(), scheduler=d.UniPCMultistepScheduler(flow_shift=3.0))


def wan21() -> PipelineCase:
    return built("WanPipeline", **wan_parts(d.WanTransformer3DModel, in_channels=16)), prompts(1, 8, 32) | SIZE


def wan_image() -> PipelineCase:
    parts = wan_parts(d.WanTransformer3DModel, in_channels=36)
    return built("WanImageToVideoPipeline", **parts), prompts(1, 8, 32) | SIZE | {"image": image()}


def wan_vace() -> PipelineCase:
    parts = wan_parts(d.WanVACETransformer3DModel, in_channels=16, vace_layers=[0], vace_in_channels=96)
    return built("WanVACEPipeline", **parts), prompts(1, 8, 32) | SIZE


def skyreels() -> PipelineCase:
    parts = wan_parts(d.SkyReelsV2Transformer3DModel, in_channels=16)
    return built("SkyReelsV2Pipeline", **parts), prompts(1, 8, 32) | SIZE


def hunyuan_video() -> PipelineCase:
    transformer = d.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, text_embed_dim=16, pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    vae = d.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4, up_block_types=("HunyuanVideoUpBlock3D",) * 4,
    )  # fmt: skip
    embeds = {
        "prompt_embeds": randn(1, 6, 16),
        "pooled_prompt_embeds": randn(1, 8),
        "prompt_attention_mask": ones(1, 6),
    }
    pipe = built("HunyuanVideoPipeline", transformer=transformer, vae=vae, scheduler=flow(shift=7.0))
    return pipe, embeds | SIZE


def hunyuan_video15() -> PipelineCase:
    transformer = d.HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2, num_refiner_layers=1,
        patch_size=1, patch_size_t=1, text_embed_dim=16, text_embed_2_dim=8, image_embed_dim=12,
        rope_axes_dim=(2, 2, 4), target_size=16, task_type="t2v",
    )  # fmt: skip
    vae = d.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(16, 16), layers_per_block=1, spatial_compression_ratio=4,
        temporal_compression_ratio=4, downsample_match_channel=False, upsample_match_channel=False,
    )  # fmt: skip
    pipe = built("HunyuanVideo15Pipeline", transformer=transformer, vae=vae, scheduler=flow(), guider=guider())
    embeds = prompts(1, 6, 16) | {"prompt_embeds_mask": ones(1, 6), "negative_prompt_embeds_mask": ones(1, 6)}
    second = {"prompt_embeds": randn(1, 4, 8), "negative_prompt_embeds": randn(1, 4, 8) * 0.5}
    second |= {"prompt_embeds_mask": ones(1, 4), "negative_prompt_embeds_mask": ones(1, 4)}
    return pipe, embeds | {f"{name}_2": value for name, value in second.items()} | SIZE


def ltx() -> PipelineCase:
    transformer = d.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=8, cross_attention_dim=32,
        num_layers=1, caption_channels=16,
    )  # fmt: skip
    vae = d.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1), patch_size=1, patch_size_t=1,
        spatio_temporal_scaling=(True, True, False, False), encoder_causal=True,
        decoder_spatio_temporal_scaling=(True, True, False, False),
    )  # fmt: skip
    pipe = built("LTXPipeline", transformer=transformer, vae=vae, scheduler=flow())
    return pipe, prompts(1, 6, 16, masked=True) | SIZE | {"height": 32, "width": 32, "num_frames": 9}


def mochi() -> PipelineCase:
    transformer = d.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
        in_channels=12, text_embed_dim=32, time_embed_dim=4, max_sequence_length=16,
    )  # fmt: skip
    vae = d.AutoencoderKLMochi(
        latent_channels=12, out_channels=3, encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32), layers_per_block=(1, 1, 1, 1, 1),
    )  # fmt: skip
    pipe = built("MochiPipeline", transformer=transformer, vae=vae, scheduler=flow())
    return pipe, prompts(1, 6, 32, masked=True) | SIZE


def latte() -> PipelineCase:
    transformer = d.LatteTransformer3DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=32,
        in_channels=4, cross_attention_dim=24, out_channels=8, attention_bias=True, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
        video_length=2,
    )  # fmt: skip
    pipe = built("LattePipeline", transformer=transformer, vae=autoencoder(), scheduler=d.DDIMScheduler())
    size = {"height": 16, "width": 16, "video_length": 2, "num_inference_steps": 2}
    return pipe, prompts(1, 6, 32) | size | {"negative_prompt": None, "clean_caption": False, "mask_feature": False}


def allegro() -> PipelineCase:
    transformer = d.AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, cross_attention_dim=24, sample_width=8,
        sample_height=8, sample_frames=8, caption_channels=24,
    )  # fmt: skip
    vae = d.AutoencoderKLAllegro(
        latent_channels=4, layers_per_block=1, block_out_channels=(8, 8, 8, 8), norm_num_groups=2,
        down_block_types=("AllegroDownBlock3D",) * 4, up_block_types=("AllegroUpBlock3D",) * 4,
        temporal_compression_ratio=4,
    )  # fmt: skip
    vae.enable_tiling()
    pipe = built("AllegroPipeline", transformer=transformer, vae=vae, scheduler=d.DDIMScheduler())
    return pipe, prompts(1, 6, 24, masked=True) | SIZE | {"negative_prompt": None, "num_frames": 8}


def cogvideox_image() -> PipelineCase:
    transformer = d.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=8, out_channels=4, time_embed_dim=2,
        text_embed_dim=32, num_layers=1, sample_width=2, sample_height=2, sample_frames=9, max_text_seq_length=16,
        use_rotary_positional_embeddings=True, use_learned_positional_embeddings=True,
    )  # fmt: skip
    vae = d.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        temporal_compression_ratio=4,
    )  # fmt: skip
    pipe = built(
        "CogVideoXImageToVideoPipeline", transformer=transformer, vae=vae, scheduler=d.CogVideoXDDIMScheduler()
    )
    return pipe, prompts(1, 16, 32, length=16) | SIZE | {"image": image(), "num_frames": 9}


def sana_video() -> PipelineCase:
    transformer = d.SanaVideoTransformer3DModel(
        in_channels=16, out_channels=16, num_attention_heads=2, attention_head_dim=12, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=8,
        sample_size=8, rope_max_seq_len=32,
    )  # fmt: skip
    pipe = built("SanaVideoPipeline", transformer=transformer, vae=wan_vae(), scheduler=d.DPMSolverMultistepScheduler())
    size = {"height": 32, "width": 32, "frames": 5, "num_inference_steps": 2, "use_resolution_binning": False}
    return pipe, prompts(1, 6, 8, masked=True) | size | {"negative_prompt": None}


def easyanimate() -> PipelineCase:
    transformer = d.EasyAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=2,
        text_embed_dim=16, num_layers=1, sample_width=4, sample_height=4, patch_size=2,
    )  # fmt: skip
    vae = d.AutoencoderKLMagvit(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2,
        down_block_types=("SpatialDownBlock3D", *("SpatialTemporalDownBlock3D",) * 3),
        up_block_types=("SpatialUpBlock3D", *("SpatialTemporalUpBlock3D",) * 3),
    )  # fmt: skip
    pipe = built("EasyAnimatePipeline", transformer=transformer, vae=vae, scheduler=flow())
    return pipe, prompts(1, 6, 16, masked=True) | SIZE | {"negative_prompt": None}


def kandinsky5() -> PipelineCase:
    transformer = d.Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=16, in_text_dim2=8, time_dim=16, out_visual_dim=4, model_dim=16, ff_dim=32,
        num_text_blocks=1, num_visual_blocks=1, axes_dims=(2, 2, 4),
    )  # fmt: skip
    vae = d.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4, up_block_types=("HunyuanVideoUpBlock3D",) * 4,
    )  # fmt: skip
    lengths = torch.tensor([0, 6], dtype=torch.int32)
    embeds = {
        "prompt_embeds_qwen": randn(1, 6, 16), "prompt_embeds_clip": randn(1, 8), "prompt_cu_seqlens": lengths,
        "negative_prompt_embeds_qwen": randn(1, 6, 16) * 0.5, "negative_prompt_embeds_clip": randn(1, 8) * 0.5,
        "negative_prompt_cu_seqlens": lengths,
    }  # fmt: skip
    pipe = built("Kandinsky5T2VPipeline", transformer=transformer, vae=vae, scheduler=flow())
    return pipe, embeds | SIZE | {"height": 32, "width": 32}


VIDEOS = {
    "wan21": wan21, "wan-image": wan_image, "wan-vace": wan_vace, "skyreels": skyreels,
    "hunyuan-video": hunyuan_video, "hunyuan-video15": hunyuan_video15, "ltx": ltx, "mochi": mochi, "latte": latte,
    "allegro": allegro, "cogvideox-image": cogvideox_image, "sana-video": sana_video, "easyanimate": easyanimate,
    "kandinsky5": kandinsky5,
}  # fmt: skip
