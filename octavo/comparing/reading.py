"""Reads the text in pictures (optical character recognition, OCR), for prompts that ask for text."""

import importlib.util
import re
from difflib import SequenceMatcher
from typing import Any

import numpy as np

_QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”|«([^»]+)»|「([^」]+)」')


def asked_text(prompt: str) -> str:
    """Returns the text that the picture of `prompt` is to show, which the prompt has between double quotes: OPEN for
    'a sign that says "OPEN"'. Several texts are joined with spaces. Returns "" if there is none."""
    return " ".join(next(filter(None, groups)) for groups in _QUOTED.findall(prompt))


class Reader:
    """Reads pictures with the package rapidocr, which brings its models along (PP-OCR: Du et al., PP-OCR: A Practical
    Ultra Lightweight OCR System, 2020)."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    @classmethod
    def load(cls) -> "Reader | None":
        """Loads the models. Returns None if rapidocr or onnxruntime, which runs the models, is not installed."""
        if not all(map(importlib.util.find_spec, ("rapidocr", "onnxruntime"))):
            return None
        from rapidocr import RapidOCR

        return cls(RapidOCR(params={"Global.log_level": "error"}))

    def read(self, picture: np.ndarray) -> str:
        """Returns the text in `picture`, uint8 (height, width, 3), from top to bottom, with a space between the texts
        of two places in the picture. Returns "" if there is no text."""
        return " ".join(self._engine(np.ascontiguousarray(picture[..., ::-1])).txts or ())  # rapidocr wants BGR


def agreement(a: str, b: str) -> float | None:
    """Returns how far two texts agree, 0 to 1: twice the number of characters that match, in the same order, divided
    by the number of all characters (Ratcliff and Metzener, Pattern Matching: The Gestalt Approach, 1988). Upper and
    lower case are the same, and spaces do not count. Returns None if both texts are empty: nothing was read."""
    first, second = ("".join(text.casefold().split()) for text in (a, b))
    return SequenceMatcher(None, first, second, autojunk=False).ratio() if first or second else None
