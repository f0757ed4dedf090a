"""The scenes of the bundled pipeline. A scene is two shapes on a plain background, beside or above each other; each
scene has a prompt that describes it, and can be drawn as a picture.

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
RELATIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}  # each with its opposite
RADIUS = 9.0  # pixels
DISTANCE = 14.0  # pixels from the middle of the picture to the centre of each shape


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


@dataclass(frozen=True, eq=False)
class Scene:
    """Describes a picture of the bundled pipeline: two shapes of different colours, the relation of the first to the
    second, such as "left of", and the background. `str(scene)` is the prompt for it.

    Two scenes are equal if they describe the same picture: "a red ring above a blue cross" equals "a blue cross below a
    red ring".
    """

    first: tuple[str, str]  # colour and shape
    relation: str
    second: tuple[str, str]
    background: str

    def __str__(self) -> str:
        first, second = (f"{_article(colour)} {shape}" for colour, shape in (self.first, self.second))
        return f"{first} {self.relation} {second} on {_article(self.background)} background"

    def turned(self) -> "Scene":
        """Returns the equal scene that names the second shape first."""
        return Scene(self.second, RELATIONS[self.relation], self.first, self.background)

    def in_reading_order(self) -> "Scene":
        """Returns the equal scene whose first shape is the left or the upper one."""
        return self if self.relation in ("left of", "above") else self.turned()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scene) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[object, ...]:
        scene = self.in_reading_order()
        return scene.first, scene.relation, scene.second, scene.background

    def draw(self, moves: np.ndarray | float = 0.0, grow: float = 0.0) -> np.ndarray:
        """Draws the scene: (64, 64, 3) uint8. The left or upper shape is moved by the first row of `moves` (2, 2), x
        and y in pixels, the other shape by the second row. Both radii are larger by `grow` pixels."""
        scene = self.in_reading_order()
        aside = np.array([DISTANCE, 0.0] if scene.relation == "left of" else [0.0, DISTANCE])
        centres = SIZE / 2 + np.stack([-aside, aside]) + moves
        picture = np.broadcast_to(np.array(COLOURS[scene.background], float), (SIZE, SIZE, 3))
        for (colour, shape), (x, y) in zip((scene.first, scene.second), centres, strict=True):
            mask = coverage(shape, x, y, RADIUS + grow)
            picture = picture + mask[..., None] * (np.array(COLOURS[colour]) - picture)
        return np.rint(picture).astype(np.uint8)


def _article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


_COLOUR, _SHAPE = "|".join(COLOURS), "|".join(SHAPES)
_PROMPT = re.compile(
    rf"an? ({_COLOUR}) ({_SHAPE}) ({'|'.join(RELATIONS)}) an? ({_COLOUR}) ({_SHAPE}) on an? ({_COLOUR}) background"
)


def parse(prompt: str) -> Scene:
    """Returns the scene that a prompt describes. Raises ValueError for text that is not the prompt of a scene."""
    match = _PROMPT.fullmatch(prompt.strip())
    if match is None:
        raise ValueError(f"prompt {prompt!r}: not a scene of the bundled pipeline, such as {_EXAMPLE}")
    colour, shape, relation, other_colour, other_shape, background = match.groups()
    return Scene((colour, shape), relation, (other_colour, other_shape), background)


_EXAMPLE = Scene(("red", "circle"), "left of", ("blue", "square"), "white")


def split() -> tuple[list[Scene], list[Scene]]:
    """Splits all scenes into (train, held out): 300 pictures, fixed by a seed, are kept out of training. Each picture
    has two scenes, which are equal and have different prompts."""
    things = list(itertools.product(COLOURS, SHAPES))
    pictures = [
        Scene(first, relation, second, background)
        for first, relation, second, background in itertools.product(things, ("left of", "above"), things, COLOURS)
        if len({first[0], second[0], background}) == 3
    ]
    random.Random(64).shuffle(pictures)
    scenes = [scene for picture in pictures for scene in (picture, picture.turned())]
    return scenes[600:], scenes[:600]
