"""Tiny pipelines whose denoiser is a UNet, with random weights."""

from typing import Any

import diffusers as d
import torch

from .parts import PipelineCase, autoencoder, built, image, prompts, randn

SIZE = {"height": 16, "width": 16, "num_inference_steps": 2}
CROSS, PLAIN = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")


def unet(channels: int = 4, **config: Any) -> Any:
    kinds = dict(down_block_types=CROSS, up_block_types=PLAIN) | config
    return d.UNet2DConditionModel(
        block_out_channels=(4, 8), layers_per_block=1, sample_size=8, in_channels=channels, out_channels=4,
        norm_num_groups=2, cross_attention_dim=16, attention_head_dim=2, **kinds,
    )  # fmt: skip


def sd_parts(channels: int = 4, **config: Any) -> dict[str, Any]:
    return dict(unet=unet(channels, **config), vae=autoencoder(), scheduler=d.DDIMScheduler(), safety_checker=None)


SD = prompts(1, 7, 16) | SIZE


def sd15() -> PipelineCase:
    return built("StableDiffusionPipeline", **sd_parts()), SD


def sd_image() -> PipelineCase:
    arguments = prompts(1, 7, 16) | {"image": image(), "num_inference_steps": 3}
    return built("StableDiffusionImg2ImgPipeline", **sd_parts()), arguments


def sd_inpaint() -> PipelineCase:
    pictures = {"image": image(), "mask_image": torch.ones(1, 1, 16, 16)}
    return built("StableDiffusionInpaintPipeline", **sd_parts(9)), SD | pictures


def sd_pag() -> PipelineCase:
    return built("StableDiffusionPAGPipeline", **sd_parts(), pag_applied_layers=["mid"]), SD | {"pag_scale": 3.0}


def controlnet(**config: Any) -> Any:
    net = d.ControlNetModel(
        block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, down_block_types=CROSS,
        cross_attention_dim=16, attention_head_dim=2, conditioning_embedding_out_channels=(2, 4), **config,
    )  # fmt: skip
    with torch.no_grad():
        for part in (*net.controlnet_down_blocks, net.controlnet_mid_block):
            part.weight.normal_(std=0.1)  # diffusers initializes these weights to zero
    return net


def sd_controlnet() -> PipelineCase:
    pipe = built("StableDiffusionControlNetPipeline", **sd_parts(), controlnet=controlnet())
    return pipe, prompts(1, 7, 16) | {"image": image(), "num_inference_steps": 2}


def sd_adapter() -> PipelineCase:
    adapter = d.T2IAdapter(in_channels=3, channels=[4, 8], num_res_blocks=1, downscale_factor=2)
    parts = sd_parts(down_block_types=CROSS[::-1], up_block_types=PLAIN[::-1])
    pipe = built("StableDiffusionAdapterPipeline", **parts, adapter=adapter)
    return pipe, SD | {"image": image()}


def lcm() -> PipelineCase:
    parts = sd_parts(time_cond_proj_dim=8) | {"scheduler": d.LCMScheduler()}
    arguments = {name: value for name, value in SD.items() if name != "negative_prompt_embeds"}
    return built("LatentConsistencyModelPipeline", **parts), arguments


def sdxl_parts() -> dict[str, Any]:
    model = unet(
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1), projection_class_embeddings_input_dim=80,
    )  # fmt: skip
    return dict(unet=model, vae=autoencoder(), scheduler=d.EulerDiscreteScheduler(), add_watermarker=False)


POOLED = {"pooled_prompt_embeds": randn(1, 32), "negative_pooled_prompt_embeds": randn(1, 32) * 0.5}


def sdxl_controlnet() -> PipelineCase:
    net = controlnet(
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1), projection_class_embeddings_input_dim=80,
    )  # fmt: skip
    pipe = built("StableDiffusionXLControlNetPipeline", **sdxl_parts(), controlnet=net)
    return pipe, prompts(1, 7, 16) | POOLED | {"image": image(), "num_inference_steps": 2}


def sdxl_pag() -> PipelineCase:
    pipe = built("StableDiffusionXLPAGPipeline", **sdxl_parts(), pag_applied_layers=["mid"])
    return pipe, SD | POOLED | {"pag_scale": 3.0}


def ddpm() -> PipelineCase:
    model = d.UNet2DModel(
        sample_size=8, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, attention_head_dim=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    pipe = built("DDPMPipeline", unet=model, scheduler=d.DDPMScheduler())
    return pipe, {"num_inference_steps": 2, "output_type": "np"}


def animatediff() -> PipelineCase:
    adapter = d.MotionAdapter(
        block_out_channels=(4, 8), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=2
    )
    parts = {name: part for name, part in sd_parts().items() if name != "safety_checker"}
    pipe = built("AnimateDiffPipeline", **parts, motion_adapter=adapter)
    return pipe, SD | {"num_frames": 4}


def text_to_video() -> PipelineCase:
    model = d.UNet3DConditionModel(
        block_out_channels=(4, 8), layers_per_block=1, sample_size=8, norm_num_groups=2, cross_attention_dim=16,
        attention_head_dim=2, down_block_types=("DownBlock3D", "CrossAttnDownBlock3D"),
        up_block_types=("CrossAttnUpBlock3D", "UpBlock3D"),
    )  # fmt: skip
    pipe = built("TextToVideoSDPipeline", unet=model, vae=autoencoder(), scheduler=d.DDIMScheduler())
    return pipe, SD | {"num_frames": 2}


def kandinsky22() -> PipelineCase:
    model = d.UNet2DConditionModel(
        block_out_channels=(4, 8), layers_per_block=1, sample_size=8, in_channels=4, out_channels=8,
        norm_num_groups=2, addition_embed_type="image", encoder_hid_dim=8, encoder_hid_dim_type="image_proj",
        cross_attention_dim=8, attention_head_dim=4, resnet_time_scale_shift="scale_shift", class_embed_type=None,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    )  # fmt: skip
    movq = d.VQModel(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
        num_vq_embeddings=12, up_block_types=("UpDecoderBlock2D",) * 2, vq_embed_dim=4,
    )  # fmt: skip
    pipe = built("KandinskyV22Pipeline", unet=model, movq=movq, scheduler=d.DDIMScheduler())
    embeds = {"image_embeds": randn(1, 8), "negative_image_embeds": randn(1, 8) * 0.5}
    return pipe, embeds | {"height": 64, "width": 64, "num_inference_steps": 2}


def kandinsky3() -> PipelineCase:
    model = d.Kandinsky3UNet(
        time_embedding_dim=4, groups=2, attention_head_dim=4, layers_per_block=3, block_out_channels=(8, 16),
        cross_attention_dim=4, encoder_hid_dim=16,
    )  # fmt: skip
    movq = d.VQModel(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
        num_vq_embeddings=12, up_block_types=("UpDecoderBlock2D",) * 2, vq_embed_dim=4,
    )  # fmt: skip
    pipe = built("Kandinsky3Pipeline", unet=model, movq=movq, scheduler=d.DDIMScheduler())
    masks = {"attention_mask": torch.ones(1, 7), "negative_attention_mask": torch.ones(1, 7)}
    return pipe, prompts(1, 7, 16) | masks | {"height": 64, "width": 64, "num_inference_steps": 2}


def cascade() -> PipelineCase:
    decoder = d.StableCascadeUNet(
        in_channels=4, out_channels=4, conditioning_dim=16, block_out_channels=(8, 16), num_attention_heads=(-1, 2),
        down_num_layers_per_block=(1, 1), up_num_layers_per_block=(1, 1), effnet_in_channels=4, patch_size=1,
        clip_text_pooled_in_channels=16, clip_seq=1, dropout=(0.0, 0.0), timestep_ratio_embedding_dim=8,
        block_types_per_layer=(
            ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
            ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
        ),
        timestep_conditioning_type=("sca",), down_blocks_repeat_mappers=(1, 1), up_blocks_repeat_mappers=(2, 2),
    )  # fmt: skip
    pipe = built(
        "StableCascadeDecoderPipeline", decoder=decoder, scheduler=d.DDPMWuerstchenScheduler(), latent_dim_scale=4.0
    )
    pooled = {"prompt_embeds_pooled": randn(1, 1, 16), "negative_prompt_embeds_pooled": randn(1, 1, 16) * 0.5}
    return pipe, prompts(1, 7, 16) | pooled | {
        "image_embeddings": randn(1, 4, 4, 4), "num_inference_steps": 2, "guidance_scale": 2.0
    }  # fmt: skip


def video_diffusion() -> PipelineCase:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    model = d.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 32), layers_per_block=1, sample_size=8, cross_attention_dim=16, num_attention_heads=2,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"), addition_time_embed_dim=8,
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        projection_class_embeddings_input_dim=24,
    )  # fmt: skip
    vae = d.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4
    )
    config = CLIPVisionConfig(
        hidden_size=16, projection_dim=16, num_hidden_layers=1, num_attention_heads=2, image_size=16,
        intermediate_size=16, patch_size=4,
    )  # fmt: skip
    encoder = CLIPVisionModelWithProjection(config)
    pipe = built(
        "StableVideoDiffusionPipeline", unet=model, vae=vae, image_encoder=encoder,
        scheduler=d.EulerDiscreteScheduler(prediction_type="v_prediction", use_karras_sigmas=True, sigma_max=700.0),
        feature_extractor=CLIPImageProcessor(crop_size=16, size=16),
    )  # fmt: skip
    return pipe, SIZE | {"image": image(), "num_frames": 2, "min_guidance_scale": 1.0, "max_guidance_scale": 2.5}


UNETS = {
    "sd15": sd15, "sd-image": sd_image, "sd-inpaint": sd_inpaint, "sd-pag": sd_pag, "sd-controlnet": sd_controlnet,
    "sd-adapter": sd_adapter, "lcm": lcm, "sdxl-controlnet": sdxl_controlnet, "sdxl-pag": sdxl_pag, "ddpm": ddpm,
    "animatediff": animatediff, "text-to-video": text_to_video, "kandinsky22": kandinsky22, "kandinsky3": kandinsky3,
    "cascade": cascade, "video-diffusion": video_diffusion,
}  # fmt: skip
