"""A whole Wan 2.2 pipeline with random weights and two denoisers, including a text encoder and a tokenizer."""

from pathlib import Path

import torch
from transformers import T5Config, T5EncoderModel

from .opensora import tiny_tokenizer
from .pipelines import make

# options of a small run: one prompt, a video of 5 frames; with 4 steps both denoisers run
WAN = (
    *("--height", 16, "--width", 16, "--frames", 5, "--prompts", "videos", "--limit", 1),
    *("--arg", "max_sequence_length=9"),
)


def whole_wan(folder: Path) -> Path:
    """Writes the pipeline to `folder` and returns that path."""
    pipe = make("wan22")[0]
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    pipe.register_modules(text_encoder=T5EncoderModel(config).eval(), tokenizer=tiny_tokenizer())
    pipe.save_pretrained(folder)
    return folder
