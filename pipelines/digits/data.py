"""Handwritten digits that come with scikit-learn: 1797 pictures of 8 x 8, by 43 people (Alpaydin, Kaynak, 1998)."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

HELD_OUT = 450  # pictures, a quarter


class Part(NamedTuple):
    """Holds pictures (n, 8, 8) uint8, white on black, and their digits as `labels` (n,)."""

    pictures: np.ndarray
    labels: np.ndarray


def digits() -> tuple[Part, Part]:
    """Returns the pictures to train on and the held-out pictures; the split is always the same."""
    from sklearn.datasets import load_digits

    dataset = load_digits()
    pictures = np.rint(dataset.images * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(pictures))
    held_out, train = order[:HELD_OUT], order[HELD_OUT:]
    return Part(pictures[train], dataset.target[train]), Part(pictures[held_out], dataset.target[held_out])


def write_pictures(pictures: np.ndarray, folder: Path) -> Path:
    """Writes `pictures` (n, 8, 8) as 0000.png, 0001.png and so on into `folder`, which is created if it does not exist;
    returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for at, values in enumerate(pictures):
        Image.fromarray(values).save(folder / f"{at:04d}.png")
    return folder
