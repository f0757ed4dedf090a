"""A tiny Open-Sora pipeline with random weights. Nothing is downloaded."""

from typing import Any

import torch
from diffusers import AutoencoderKL
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from octavo.pipelines.opensora import OpenSoraPipeline, RFlowScheduler, STDiT3

CAPTION_LENGTH = 20
CAPTION_CHANNELS = 16


def tiny_transformer(seed: int = 0, **config: Any) -> STDiT3:
    """Builds an STDiT3 of a few thousand parameters. No parameter is all zeros, so every layer affects the output."""
    torch.manual_seed(seed)
    defaults = {"hidden_size": 32, "depth": 2, "num_heads": 4, "caption_channels": CAPTION_CHANNELS}
    model = STDiT3(**{**defaults, "model_max_length": CAPTION_LENGTH, **config}).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "table" in name:
                parameter.normal_(std=0.2)
            elif name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name != "rope.freqs" and not parameter.any():
                parameter.normal_(std=0.2)
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer of letters and common signs that ends a text with "</s>", as T5's does."""
    signs = ["<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz0123456789.,:;-' "]
    tokenizer = Tokenizer(models.WordLevel({sign: i for i, sign in enumerate(signs)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def tiny_text_encoder(seed: int = 1) -> T5EncoderModel:
    """Builds a T5 encoder of one layer, for the tokens of `tiny_tokenizer`."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=64,
        d_model=CAPTION_CHANNELS,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config).eval()


def tiny_vae(seed: int = 2) -> AutoencoderKL:
    """Builds a 2-D autoencoder with four latent channels and a spatial factor of 8."""
    torch.manual_seed(seed)
    blocks = 4
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(4,) * blocks,
        layers_per_block=1,
        norm_num_groups=2,
    ).eval()


def tiny_pipeline(vae: bool = False, dtype: torch.dtype = torch.float32, **config: Any) -> OpenSoraPipeline:
    """Builds the whole pipeline. A call with SMALL takes less than a second."""
    pipe = OpenSoraPipeline(
        transformer=tiny_transformer(**config).to(dtype),
        scheduler=RFlowScheduler(),
        tokenizer=tiny_tokenizer(),
        text_encoder=tiny_text_encoder(),
        vae=tiny_vae() if vae else None,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


# Arguments for five latent frames of 5x6 positions. The odd height is padded to whole patches.
SMALL: dict[str, Any] = {
    "height": 40,
    "width": 50,
    "num_frames": 17,
    "num_inference_steps": 3,
    "output_type": "latent",
}
