"""The scenes of the bundled pipeline. A scene is one shape on a plain background; each scene has a prompt that
describes it, and can be drawn as a picture.

Pictures are 64x64 RGB; coordinates are pixels, origin top left. This module needs no torch. The drawn scenes are the
pictures that the pipeline is trained on, and the tests check the judge (`judge.py`) with them.
"""

import itertools
import random
import re
from dataclasses import dataclass

import numpy as np

SIZE = 64  # pixels of a side
COLOURS = {
    "red": (214, 40, 40),
    "orange": (247, 140, 20),
    "yellow": (250, 222, 60),
    "green": (40, 160, 70),
    "blue": (45, 85, 215),
    "purple": (140, 60, 180),
    "white": (245, 245, 245),
    "black": (22, 22, 22),
}
RADII = {"small": 7.0, "medium": 10.5, "large": 14.0}  # pixels
PLACES = {  # (row, column) of a 3x3 grid
    "at the top left": (0, 0),
    "at the top": (0, 1),
    "at the top right": (0, 2),
    "on the left": (1, 0),
    "in the center": (1, 1),
    "on the right": (1, 2),
    "at the bottom left": (2, 0),
    "at the bottom": (2, 1),
    "at the bottom right": (2, 2),
}
CENTRES = (17.0, 32.0, 47.0)  # pixels; the middle of each row and column of the grid


def _circle(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    return np.hypot(x, y) - r


def _square(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    return np.maximum(abs(x), abs(y)) - 0.88 * r


def _triangle(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    sides = (1.75 * abs(x) - (y + r)) / np.hypot(1.75, 1.0)
    return np.maximum(sides, y - 0.75 * r)


def _diamond(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    return (abs(x) + abs(y) - 1.1 * r) / np.sqrt(2.0)


def _cross(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    arm = 0.36 * r
    return np.minimum(np.maximum(abs(x) - r, abs(y) - arm), np.maximum(abs(x) - arm, abs(y) - r))


def _ring(x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    return abs(np.hypot(x, y) - 0.76 * r) - 0.26 * r


SHAPES = {  # signed distance to the outline, negative inside
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "cross": _cross,
    "ring": _ring,
}


def coverage(shape: str, cx: float, cy: float, radius: float) -> np.ndarray:
    """Returns the share of each pixel that is covered by `shape`, such as "ring", centred at (cx, cy), with `radius` in
    pixels: (64, 64) in [0, 1], anti-aliased."""
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    distance: np.ndarray = SHAPES[shape](x - cx, y - cy, radius)
    return np.clip(0.5 - distance, 0.0, 1.0)


@dataclass(frozen=True)
class Scene:
    """Describes a picture of the bundled pipeline by five words; `str(scene)` is the prompt for it."""

    size: str
    colour: str
    shape: str
    place: str
    background: str

    def __str__(self) -> str:
        article = "an" if self.background[0] in "aeiou" else "a"
        return f"a {self.size} {self.colour} {self.shape} {self.place} on {article} {self.background} background"

    def draw(self, dx: float = 0.0, dy: float = 0.0, grow: float = 0.0) -> np.ndarray:
        """Draws the scene: (64, 64, 3) uint8, moved by (dx, dy) pixels, with a radius that is larger by `grow`
        pixels."""
        row, column = PLACES[self.place]
        mask = coverage(self.shape, CENTRES[column] + dx, CENTRES[row] + dy, RADII[self.size] + grow)
        back, front = np.array(COLOURS[self.background]), np.array(COLOURS[self.colour])
        return np.rint(back + mask[..., None] * (front - back)).astype(np.uint8)


_PROMPT = re.compile(
    rf"a (?P<size>{'|'.join(RADII)}) (?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)}) "
    rf"(?P<place>{'|'.join(sorted(PLACES, key=len, reverse=True))}) "
    rf"on an? (?P<background>{'|'.join(COLOURS)}) background"
)


def parse(prompt: str) -> Scene:
    """Returns the scene that a prompt describes. Raises ValueError for text that is not the prompt of a scene."""
    match = _PROMPT.fullmatch(prompt.strip())
    if match is None:
        raise ValueError(f"prompt {prompt!r}: not a scene of the bundled pipeline, such as {Scene(*_EXAMPLE)}")
    return Scene(**match.groupdict())


_EXAMPLE = ("small", "red", "triangle", "at the top left", "yellow")


def split() -> tuple[list[Scene], list[Scene]]:
    """Splits all scenes into (train, held out): 600 scenes, fixed by a seed, are kept out of training."""
    scenes = [
        Scene(size, colour, shape, place, background)
        for size, colour, shape, place, background in itertools.product(RADII, COLOURS, SHAPES, PLACES, COLOURS)
        if colour != background
    ]
    random.Random(64).shuffle(scenes)
    return scenes[600:], scenes[:600]
