"""Counts the prompts that a pipeline's tokenizers cut, in place of the libraries' lines about each of them."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

_NO_LIMIT = 100_000  # tokens; transformers gives tokenizers without a limit one of 1e30
_LINES = ("can only handle sequences up to", "Token indices sequence length is longer")


def long_prompts(pipe: Any, texts: Sequence[str]) -> str | None:
    """A sentence on how many of `texts` are longer than the tokenizers of `pipe` take; None where none is."""
    tokenizers = [part for name, part in vars(pipe).items() if "tokenizer" in name and callable(part)]
    limits = {id(part): getattr(part, "model_max_length", _NO_LIMIT) for part in tokenizers}
    tokenizer = min(tokenizers, key=lambda part: limits[id(part)], default=None)
    if tokenizer is None or not 0 < (limit := limits[id(tokenizer)]) < _NO_LIMIT:
        return None
    count = sum(len(tokenizer(text, truncation=False, verbose=False).input_ids) > limit for text in texts)
    if not count:
        return None
    longer = f"{count} of {len(texts)} prompts are" if len(texts) > 1 else "The prompt is"
    return f"{longer} longer than the {limit} tokens of the tokenizer, which cuts off the rest."


@contextmanager
def counted_elsewhere() -> Iterator[None]:
    """Keeps the lines of diffusers and transformers about prompts that `long_prompts` counts off the terminal."""

    def wanted(record: logging.LogRecord) -> bool:
        return not any(words in record.getMessage() for words in _LINES)

    handlers = [handler for name in ("diffusers", "transformers") for handler in logging.getLogger(name).handlers]
    for handler in handlers:
        handler.addFilter(wanted)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(wanted)
