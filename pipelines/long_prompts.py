"""Counts the prompts that a pipeline's tokenizers cut, and hides the line that a library logs for each of them."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from .prompted import parameters_of

_NO_LIMIT = 100_000  # tokens; transformers gives tokenizers without a limit one of 1e30
_LENGTH = "max_sequence_length"  # argument of most pipelines with a text encoder other than CLIP
_LINES = ("input was truncated because", "Token indices sequence length is longer")


def long_prompts(pipe: Any, texts: Sequence[str], arguments: Mapping[str, Any]) -> str | None:
    """Returns a text with one sentence for each tokenizer that cuts some of the prompts `texts`; None if no tokenizer
    cuts any of them.

    `arguments` are the arguments of the call of `pipe`; the negative prompt among them is counted too.
    """
    negative = arguments.get("negative_prompt")
    negatives = negative if isinstance(negative, (list, tuple)) else [negative]
    said = []
    for limit, (name, tokenizer) in sorted(_limits(pipe, arguments).items()):
        for whose, given in (("prompt", texts), ("negative prompt", negatives)):
            found = [_length(tokenizer, text) for text in given if isinstance(text, str)]
            if count := sum(length > limit for length in found):
                who = f"The {whose} is" if len(found) == 1 else f"{count} of {len(found)} {whose}s are"
                said.append(f"{who} longer than the {limit} tokens of the {name}, which cuts off the rest.")
    return " ".join(said) or None


def _limits(pipe: Any, arguments: Mapping[str, Any]) -> dict[int, tuple[str, Callable[..., Any]]]:
    """Returns a dict from a limit in tokens to a pair: the name of a tokenizer that cuts texts at this limit, and the
    tokenizer itself. If several tokenizers of `pipe` have the same limit, only the first is in the dict.

    The limit of a CLIP tokenizer is its model_max_length. For other tokenizers the limit is max_sequence_length, from
    `arguments` or else the default of the pipeline's call.
    """
    parameter = parameters_of(pipe).get(_LENGTH)
    length = arguments.get(_LENGTH, None if parameter is None else parameter.default)
    found: dict[int, tuple[str, Callable[..., Any]]] = {}
    for name, part in vars(pipe).items():
        if "tokenizer" in name and hasattr(part, "model_max_length"):  # a processor of Flux 2's kind has none
            limit = part.model_max_length
            if isinstance(length, int) and not type(part).__name__.startswith("CLIP"):
                limit = length
            if 0 < limit < _NO_LIMIT:
                found.setdefault(limit, (name, part))
    return found


def _length(tokenizer: Callable[..., Any], text: str) -> int:
    return len(tokenizer(text, truncation=False, verbose=False).input_ids)


@contextmanager
def counted_elsewhere(pipe: Any, prompt: str, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Inside the `with` block, hides what diffusers and transformers log when a tokenizer cuts `prompt`, provided that
    `long_prompts` counts the prompt as cut. Otherwise nothing is hidden.

    `arguments` are the arguments of the call of `pipe`.
    """
    counted = long_prompts(pipe, [prompt], arguments) is not None

    def wanted(record: logging.LogRecord) -> bool:
        return not (counted and any(words in record.getMessage() for words in _LINES))

    handlers = [handler for name in ("diffusers", "transformers") for handler in logging.getLogger(name).handlers]
    for handler in handlers:
        handler.addFilter(wanted)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(wanted)
