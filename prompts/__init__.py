"""Prompt sets, one prompt in each line: the bundled ones by name, the user's own by path."""

from .reading import BUNDLED, Prompts, read_prompts

__all__ = ["BUNDLED", "Prompts", "read_prompts"]
