"""Prepares prompts for the transformer: scores, cleaning, T5 states."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from octavo.capture.errors import UsageError


def with_scores(
    prompt: str,
    aesthetic: float | None = 6.5,
    motion: float | None = None,
    camera_motion: str | None = None,
) -> str:
    """Appends an aesthetic score, a motion score and the camera motion (such as "zoom in") to a prompt, in the words
    that the model was trained with ("motion score: 5.0.").

    A score that is None or already in the prompt is not appended.
    """
    scores = {
        "aesthetic score": None if aesthetic is None else f"{aesthetic:.1f}",
        "motion score": None if motion is None else f"{motion:.1f}",
        "camera motion": camera_motion,
    }
    for name, value in scores.items():
        # "aesthetic score:" ends on the same word as "motion score:" does, but contains no other name
        if value is not None and f"{name}:" not in prompt:
            prompt = f"{prompt} {name}: {value}."
    return prompt


def clean_caption(text: str) -> str:
    """Cleans a caption as in training: makes it lower case, removes links, HTML, Chinese characters and the like, and
    replaces typographic quotes and dashes by plain ones.

    The cleaning is that of DeepFloyd IF, applied twice, in diffusers' implementation for PixArt. Raises UsageError if
    ftfy or beautifulsoup4 is not installed.
    """
    missing = [name for name, module in (("ftfy", "ftfy"), ("beautifulsoup4", "bs4")) if find_spec(module) is None]
    if missing:
        raise UsageError(
            f"prompt: cleaning needs {' and '.join(missing)}. Install octavo[opensora] or pass clean_caption=False.",
        )
    from diffusers import PixArtAlphaPipeline

    cleaner = PixArtAlphaPipeline.__new__(PixArtAlphaPipeline)  # the method needs no attribute that __init__ sets
    return cleaner._text_preprocessing(text, clean_caption=True)[0]  # type: ignore[attr-defined]  # a lazy import


def encode(prompts: Sequence[str], tokenizer: Any, encoder: nn.Module, length: int) -> tuple[Tensor, Tensor]:
    """Encodes n prompts. Returns the states of the T5 `encoder`, (n, 1, length, channels), and the mask (n, length),
    int64, which is 1 for tokens of the text and 0 for padding.

    The states of padding are not set to zero. `length` is the number of tokens to which each prompt is padded or cut.
    """
    tokens = tokenizer(
        list(prompts),
        max_length=length,
        padding="max_length",
        truncation=True,
        return_attention_mask=True,
        add_special_tokens=True,
        return_tensors="pt",
    )
    device = next(encoder.parameters()).device
    mask = tokens.attention_mask.to(device)
    with torch.no_grad():
        states = encoder(input_ids=tokens.input_ids.to(device), attention_mask=mask).last_hidden_state
    return states[:, None], mask
