"""Tiny whole pipelines with several networks to quantize: combined cascades, and a ControlNet beside a UNet."""

import importlib
from typing import Any

import diffusers as d
import torch
import transformers as t
from tokenizers import pre_tokenizers

from .parts import PipelineCase
from .unet_pipelines import controlnet

_WIDTH = 32  # width of the embeddings of texts and pictures
_VOCABULARY = 514  # 256 bytes, 256 bytes that end a word, and the beginning and the end of a text
_CLIP = {"hidden_size": _WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def _tokenizer() -> Any:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return t.CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=77)


def _text_encoder(kind: Any = t.CLIPTextModelWithProjection, width: int = _WIDTH) -> Any:
    ends = {"bos_token_id": _VOCABULARY - 2, "eos_token_id": _VOCABULARY - 1, "pad_token_id": 1}
    size = _CLIP | {"hidden_size": width, "projection_dim": width}
    return kind(t.CLIPTextConfig(vocab_size=_VOCABULARY, **size, **ends)).eval()


def _image_encoder() -> Any:
    config = t.CLIPVisionConfig(image_size=28, patch_size=14, projection_dim=_WIDTH, **_CLIP)
    return t.CLIPVisionModelWithProjection(config).eval()


def _image_processor() -> Any:
    return t.CLIPImageProcessor(crop_size=28, size={"shortest_edge": 28})


def kandinsky_combined() -> Any:
    """Builds a pipeline with a prior, an image encoder and a UNet."""
    torch.manual_seed(0)
    prior = d.PriorTransformer(2, 12, num_layers=1, embedding_dim=_WIDTH, num_embeddings=77, additional_embeddings=4)
    prior.clip_std.data.fill_(1.0)
    unet = d.UNet2DConditionModel(
        in_channels=4, out_channels=8, addition_embed_type="image", block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), encoder_hid_dim=_WIDTH,
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), encoder_hid_dim_type="image_proj",
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", cross_attention_dim=16, attention_head_dim=4,
        resnet_time_scale_shift="scale_shift", norm_num_groups=4,
    )  # fmt: skip
    movq = d.VQModel(
        block_out_channels=(32,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        latent_channels=4, norm_num_groups=8, norm_type="spatial", num_vq_embeddings=12, vq_embed_dim=4,
    )  # fmt: skip
    return d.KandinskyV22CombinedPipeline(
        unet=unet.eval(), scheduler=d.DDIMScheduler(), movq=movq.eval(), prior_prior=prior.eval(),
        prior_image_encoder=_image_encoder(), prior_text_encoder=_text_encoder(), prior_tokenizer=_tokenizer(),
        prior_scheduler=d.UnCLIPScheduler(prediction_type="sample"), prior_image_processor=_image_processor(),
    )  # fmt: skip


def cascade_combined() -> PipelineCase:
    """Builds a pipeline whose prior and decoder have one class. diffusers saves such a pipeline but does not load
    it."""
    torch.manual_seed(0)
    counts = ("down_num_layers_per_block", "up_num_layers_per_block")
    repeats = ("down_blocks_repeat_mappers", "up_blocks_repeat_mappers")
    shared: dict[str, Any] = {"conditioning_dim": 16, "clip_text_pooled_in_channels": _WIDTH}
    shared |= dict.fromkeys((*counts, *repeats), (1, 1))
    prior = d.StableCascadeUNet(
        in_channels=16, out_channels=16, block_out_channels=(16, 16), num_attention_heads=(2, 2),
        switch_level=(False,), clip_text_in_channels=_WIDTH, clip_image_in_channels=_WIDTH, **shared,
    )  # fmt: skip
    blocks = ("SDCascadeResBlock", "SDCascadeTimestepBlock")
    decoder = d.StableCascadeUNet(
        in_channels=4, out_channels=4, block_out_channels=(8, 16), num_attention_heads=(-1, 2), switch_level=None,
        block_types_per_layer=(blocks, (*blocks, "SDCascadeAttnBlock")), **shared,
    )  # fmt: skip
    home = importlib.import_module("diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model")
    vqgan = home.PaellaVQModel(bottleneck_blocks=1, num_vq_embeddings=2).eval()
    pipe = d.StableCascadeCombinedPipeline(
        tokenizer=_tokenizer(), text_encoder=_text_encoder(), decoder=decoder.eval(), vqgan=vqgan,
        scheduler=d.DDPMWuerstchenScheduler(),
        prior_prior=prior.eval(), prior_text_encoder=_text_encoder(), prior_tokenizer=_tokenizer(),
        prior_scheduler=d.DDPMWuerstchenScheduler(), prior_feature_extractor=_image_processor(),
        prior_image_encoder=_image_encoder(),
    )  # fmt: skip
    for module in (prior, decoder):
        for weight in module.parameters():
            if weight.ndim > 1 and not weight.any():
                torch.nn.init.normal_(weight, std=0.1)
    size = {"height": 128, "width": 128, "num_inference_steps": 2, "prior_num_inference_steps": 2}
    return pipe, {"prompt": "a cat", **size}


def whole_controlnet() -> Any:
    """Builds a pipeline with a UNet, its ControlNet, a text encoder and a tokenizer."""
    torch.manual_seed(0)
    cross = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    unet = d.UNet2DConditionModel(
        sample_size=8, down_block_types=cross[0], up_block_types=cross[1], block_out_channels=(4, 8),
        layers_per_block=1, norm_num_groups=2, cross_attention_dim=16, attention_head_dim=2,
    )  # fmt: skip
    vae = d.AutoencoderKL(
        block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=2,
    )  # fmt: skip
    return d.StableDiffusionControlNetPipeline(
        vae=vae.eval(), text_encoder=_text_encoder(t.CLIPTextModel, 16), tokenizer=_tokenizer(), unet=unet.eval(),
        controlnet=controlnet().eval(), scheduler=d.DDIMScheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
