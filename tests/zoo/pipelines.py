"""Tiny diffusers pipelines with random weights, by name. Each function returns a pipeline and the arguments of a call.

Pipelines that take embeddings have no text encoders. Nothing is downloaded.
"""

import inspect
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

from .image_pipelines import IMAGES
from .parts import PipelineCase, autoencoder, randn
from .unet_pipelines import UNETS
from .video_pipelines import VIDEOS


def _seeded(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd3() -> PipelineCase:
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=16,
        pos_embed_max_size=8,
    )  # fmt: skip
    pipe = StableDiffusion3Pipeline(
        transformer=transformer, vae=autoencoder(shift_factor=0.0), scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    embeds = dict(
        prompt_embeds=randn(1, 7, 64), negative_prompt_embeds=randn(1, 7, 64) * 0.5,
        pooled_prompt_embeds=randn(1, 16), negative_pooled_prompt_embeds=randn(1, 16) * 0.5,
    )  # fmt: skip
    return _seeded(pipe), dict(**embeds, height=16, width=16, num_inference_steps=3)


def flux() -> PipelineCase:
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    pipe = FluxPipeline(
        transformer=transformer, vae=autoencoder(1, shift_factor=0.0), scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    embeds = dict(prompt_embeds=randn(1, 6, 32), pooled_prompt_embeds=randn(1, 16))
    return _seeded(pipe), dict(**embeds, height=16, width=16, num_inference_steps=3, max_sequence_length=6)


def _wan_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=32, freq_dim=256, ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )  # fmt: skip


def wan22() -> PipelineCase:
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    pipe = WanPipeline(
        transformer=_wan_transformer(), transformer_2=_wan_transformer(), vae=vae, tokenizer=None, text_encoder=None,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        boundary_ratio=0.875,
    )  # fmt: skip
    embeds = dict(prompt_embeds=randn(1, 8, 32), negative_prompt_embeds=randn(1, 8, 32) * 0.5)
    return _seeded(pipe), dict(**embeds, height=16, width=16, num_frames=5, num_inference_steps=4, output_type="latent")


def cogvideox() -> PipelineCase:
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=2,
        text_embed_dim=32, num_layers=1, sample_width=4, sample_height=4, sample_frames=9, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=16, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    vae = AutoencoderKLCogVideoX(
        in_channels=3, out_channels=3, down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4, block_out_channels=(8, 8, 8, 8), latent_channels=4,
        layers_per_block=1, norm_num_groups=2, temporal_compression_ratio=4,
    )  # fmt: skip
    pipe = CogVideoXPipeline(
        transformer=transformer, vae=vae, scheduler=CogVideoXDDIMScheduler(), text_encoder=None, tokenizer=None
    )
    embeds = dict(prompt_embeds=randn(1, 16, 32), negative_prompt_embeds=randn(1, 16, 32) * 0.5)
    size = dict(height=16, width=16, num_frames=8, max_sequence_length=16)
    return _seeded(pipe), dict(**embeds, **size, num_inference_steps=2, output_type="latent")


def sana() -> PipelineCase:
    transformer = SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
        sample_size=32,
    )  # fmt: skip
    vae = AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=[1, 1], downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu",
        scaling_factor=0.41407,
    )  # fmt: skip
    pipe = SanaPipeline(
        transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=None, tokenizer=None,
    )  # fmt: skip
    mask = torch.ones(1, 16, dtype=torch.long)
    embeds = dict(prompt_embeds=randn(1, 16, 8), prompt_attention_mask=mask, negative_prompt=None,
                  negative_prompt_embeds=randn(1, 16, 8) * 0.5, negative_prompt_attention_mask=mask)  # fmt: skip
    size = dict(height=32, width=32, use_resolution_binning=False)
    return _seeded(pipe), dict(**embeds, **size, num_inference_steps=2, output_type="latent")


def sdxl() -> PipelineCase:
    unet = UNet2DConditionModel(
        block_out_channels=(4, 8), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4, norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, transformer_layers_per_block=(1, 1), projection_class_embeddings_input_dim=80,
        cross_attention_dim=16,
    )  # fmt: skip
    pipe = StableDiffusionXLPipeline(
        unet=unet, vae=autoencoder(), scheduler=EulerDiscreteScheduler(), text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, add_watermarker=False,
    )  # fmt: skip
    embeds = dict(
        prompt_embeds=randn(1, 7, 16), negative_prompt_embeds=randn(1, 7, 16) * 0.5,
        pooled_prompt_embeds=randn(1, 32), negative_pooled_prompt_embeds=randn(1, 32) * 0.5,
    )  # fmt: skip
    return _seeded(pipe), dict(**embeds, height=16, width=16, num_inference_steps=2, output_type="latent")


class InPlaceScheduler(FlowMatchEulerDiscreteScheduler):
    """A scheduler that writes the next latents into the latents that it receives."""

    def step(self, model_output: Any, timestep: Any, sample: torch.Tensor, **kwargs: Any) -> Any:
        output = super().step(model_output, timestep, sample, **kwargs)
        sample.copy_(output[0])
        return (sample,)


def writes_into_its_input() -> PipelineCase:
    pipe, arguments = sd3()
    pipe.scheduler = InPlaceScheduler()
    for name in ("negative_prompt_embeds", "negative_pooled_prompt_embeds"):
        del arguments[name]
    return pipe, arguments | {"guidance_scale": 1.0, "output_type": "latent"}


TINY = {
    "sd3": sd3,
    "flux": flux,
    "wan22": wan22,
    "cogvideox": cogvideox,
    "sana": sana,
    "sdxl": sdxl,
    "writes-into-its-input": writes_into_its_input,
}


ZOO = TINY | IMAGES | UNETS | VIDEOS


def make(name: str) -> PipelineCase:
    """Builds a tiny pipeline in evaluation mode, and returns it with the arguments of a call.

    The weights are the same each time, and no matrix is all zeros.
    """
    torch.manual_seed(0)
    pipe, arguments = ZOO[name]()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
            for weight in part.parameters():
                if weight.ndim > 1 and not weight.any():
                    torch.nn.init.normal_(weight, std=0.1)
    return pipe, arguments


def run(pipe: Any, arguments: dict[str, Any]) -> torch.Tensor:
    """Calls a pipeline with a fixed seed and returns its first output as a tensor, as latents if the pipeline can."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    options = {"output_type": "latent"} if "output_type" in parameters else {}
    seed = {"generator": torch.Generator().manual_seed(0)}
    torch.manual_seed(0)  # some pipelines draw from the global generator too
    output = pipe(**options | arguments | seed, return_dict=False)[0]
    while isinstance(output, (list, tuple)) and len(output) == 1:
        output = output[0]
    if isinstance(output, (list, tuple)):
        return torch.stack([torch.as_tensor(np.asarray(item)) for item in output])
    return torch.as_tensor(np.asarray(output) if not isinstance(output, torch.Tensor) else output)
