"""Handwritten digits that ship with scikit-learn: 1797 pictures of 8 x 8, by 43 people (Alpaydin, Kaynak, 1998)."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

HELD_OUT = 450


class Part(NamedTuple):
    """Pictures (n, 8, 8) uint8, white on black, and what they show (n,)."""

    pictures: np.ndarray
    labels: np.ndarray


def digits() -> tuple[Part, Part]:
    """Those to train on and those held out; the division is always the same."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pictures = np.rint(found.images * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(pictures))
    held, train = order[:HELD_OUT], order[HELD_OUT:]
    return Part(pictures[train], found.target[train]), Part(pictures[held], found.target[held])


def write_pictures(pictures: np.ndarray, folder: Path) -> Path:
    """PNG files 0000.png and so on in `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for at, values in enumerate(pictures):
        Image.fromarray(values).save(folder / f"{at:04d}.png")
    return folder
