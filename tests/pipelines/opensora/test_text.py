"""Checks how a prompt becomes caption states."""

import re

import pytest
import torch

from octavo.pipelines.opensora import text

from ...helpers.refusals import refused
from ...zoo.opensora import tiny_text_encoder, tiny_tokenizer


def test_scores_are_added_once() -> None:
    assert text.with_scores("a cat") == "a cat aesthetic score: 6.5."
    assert text.with_scores("a cat aesthetic score: 5.", 6.5) == "a cat aesthetic score: 5."
    assert text.with_scores("a cat", None) == "a cat"
    full = text.with_scores("a cat", 7, 3.25, "pan left")
    assert full == "a cat aesthetic score: 7.0. motion score: 3.2. camera motion: pan left."


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("A Cat  sits.", "a cat sits."),
        ("  Visit https://example.com/cats now", "visit now"),
        ("<b>Bold</b> “quotes” — dash", 'bold "quotes" - dash'),
        ("#123 @someone 猫 cat &amp; dog", "cat dog"),
        ("a%20cat+runs", "a cat runs"),
        ("", ""),
    ],
)
def test_captions_are_cleaned_as_in_training(raw: str, clean: str) -> None:
    assert text.clean_caption(raw) == clean


def test_missing_cleaners_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "find_spec", lambda name: None if name == "bs4" else object())
    refused(lambda: text.clean_caption("a cat"), 2, re.compile(r"beautifulsoup4.*clean_caption=False"))


def test_states_are_padded_masked_and_not_zeroed() -> None:
    tokenizer, encoder = tiny_tokenizer(), tiny_text_encoder()
    states, mask = text.encode(["cat", "", "a very long caption indeed"], tokenizer, encoder, 12)
    assert states.shape == (3, 1, 12, 16)
    assert mask.dtype == torch.int64
    assert mask.sum(1).tolist() == [4, 1, 12]
    assert states[0, 0, 6:].abs().sum() > 0
    alone, _ = text.encode(["cat"], tokenizer, encoder, 12)
    assert torch.allclose(states[:1], alone, atol=1e-6)
