"""A whole SD3 pipeline with random weights, including text encoders and tokenizers."""

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from octavo.pipelines.demo.train import text_encoder, tokenizer

from .pipelines import make


def whole_sd3(folder: Path) -> Path:
    """Writes the pipeline to `folder`/model and returns that path."""
    tokens = tokenizer(folder / "tokenizer")
    parts = make("sd3")[0].components
    torch.manual_seed(0)
    pipe = StableDiffusion3Pipeline(
        transformer=parts["transformer"], vae=parts["vae"], scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=text_encoder(tokens, 32, 8), tokenizer=tokens, text_encoder_2=text_encoder(tokens, 32, 8),
        tokenizer_2=tokens, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    pipe.save_pretrained(folder / "model")
    return folder / "model"
