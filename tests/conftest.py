"""Fixtures shared by the tests."""

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a whole SD3 pipeline of random weights, text encoders and tokenizers included. Read only."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    from octavo.pipelines.demo.train import text_encoder, tokenizer

    from .zoo.pipelines import make

    folder = tmp_path_factory.mktemp("tiny")
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


@pytest.fixture(scope="session")
def captured(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A capture of `tiny_model`: three prompts in three steps of 16 x 16 pixels, 9 calls. Read only."""
    from .helpers.commands import capture

    folder = tmp_path_factory.mktemp("captured")
    prompts = folder / "prompts.txt"
    prompts.write_text("a red circle\na blue ring\na white cross")
    capture(tiny_model, folder / "capture", prompts)
    return folder / "capture"
