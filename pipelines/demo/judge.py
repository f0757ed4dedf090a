"""Reads a 64x64 picture of the bundled pipeline: which two shapes, colours, relation and background it shows.

Only pixels and geometry are used, no network. The background is the colour of the border. The two regions that differ
from the background are each compared with a template of each shape, drawn with the area and the centroid of the region.
The shape whose template overlaps most with the region is the shape of the region. The relation follows from the
centroids.
"""

from collections.abc import Callable, Iterable

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from .scene import COLOURS, SHAPES, SIZE, Scene, coverage

_PALETTE = np.array(list(COLOURS.values()), float)
_NAMES = list(COLOURS)
_GRID = np.arange(3.0, 19.0, 0.25)  # radii whose areas are tabulated
_AREAS = {shape: np.array([coverage(shape, 32.0, 32.0, r).sum() for r in _GRID]) for shape in SHAPES}
_SMALLEST = 12  # pixels of a region that counts as a shape


def _nearest(rgb: np.ndarray) -> int:
    return int(((_PALETTE - rgb) ** 2).sum(1).argmin())


def _median3(picture: np.ndarray) -> np.ndarray:
    """Replaces each pixel by the median of its 3x3 neighbourhood, which removes noise and keeps outlines. Beyond the
    border, the pixels of the border are repeated."""
    padded = np.pad(picture, ((1, 1), (1, 1), (0, 0)), mode="edge")
    return np.median(sliding_window_view(padded, (3, 3), axis=(0, 1)), axis=(-2, -1))


def _neighbours(picture: np.ndarray, reach: int) -> np.ndarray:
    """Returns the largest value of each pixel's square neighbourhood, `reach` pixels to each side: (64, 64)."""
    side = 2 * reach + 1
    near: np.ndarray = sliding_window_view(np.pad(picture, reach), (side, side)).max((-2, -1))
    return near


def _regions(mask: np.ndarray) -> list[np.ndarray]:
    """Returns the 4-connected regions of a boolean mask, each as a mask, that have at least 12 pixels, the largest
    first."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:  # every pixel takes the largest label of its neighbours until nothing changes
        padded = np.pad(labels, 1)
        grown = np.max(
            [padded[1:-1, 1:-1], padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]], 0
        )
        grown = np.where(mask, grown, 0)
        if (grown == labels).all():
            break
        labels = grown
    values, counts = np.unique(labels[labels > 0], return_counts=True)
    return [labels == values[i] for i in np.argsort(-counts, kind="stable") if counts[i] >= _SMALLEST]


def _shape(mask: np.ndarray) -> tuple[str | None, float, float]:
    """Returns the shape of a region and its centroid (x, y) in pixels, from the coverage of each pixel, (64, 64) in
    [0, 1]. The shape is None if no template overlaps well with the region."""
    area = mask.sum()
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    cx, cy = float((mask * x).sum() / area), float((mask * y).sum() / area)
    overlap, shape = 0.0, None
    for name in SHAPES:
        r = float(np.interp(area, _AREAS[name], _GRID))
        # the triangle's centroid lies below its origin: shift the template so that centroids agree
        template = coverage(name, cx, cy - (r / 6.0 if name == "triangle" else 0.0), r)
        score = np.minimum(mask, template).sum() / np.maximum(mask, template).sum()
        if score > overlap:
            overlap, shape = score, name
    return shape if overlap >= 0.6 else None, cx, cy


def judge(picture: np.ndarray) -> Scene | None:
    """Returns the scene that a (64, 64, 3) uint8 picture shows, with the left or upper shape first; None if it does not
    show exactly two shapes."""
    smooth = _median3(picture.astype(float))
    border = np.concatenate([smooth[:2].reshape(-1, 3), smooth[-2:].reshape(-1, 3), smooth[:, 0], smooth[:, -1]])
    back = np.median(border, axis=0)
    distance = np.sqrt(((smooth - back) ** 2).sum(2))
    regions = _regions(distance > 40)
    if len(regions) != 2:
        return None
    things = []
    for region in regions:
        front = np.median(smooth[region & (distance >= np.quantile(distance[region], 0.5))], axis=0)
        span = front - back
        # how far each pixel has gone from background to shape colour: soft coverage, (64, 64); the median filter
        # eats thin arms, so the coverage is taken from the picture itself, near the region
        mask = np.clip(((picture - back) @ span) / (span @ span), 0.0, 1.0) * _neighbours(region, 2)
        mask[mask < 0.25] = 0.0
        shape, x, y = _shape(mask)
        if shape is None:
            return None
        things.append(((_NAMES[_nearest(front)], shape), x, y))
    (one, x1, y1), (other, x2, y2) = things
    beside = abs(x1 - x2) > abs(y1 - y2)
    relation = ("left of" if x1 < x2 else "right of") if beside else ("above" if y1 < y2 else "below")
    return Scene(one, relation, other, _NAMES[_nearest(back)]).in_reading_order()


_PARTS: dict[str, Callable[[Scene], object]] = {
    "all": lambda scene: scene,
    "shapes": lambda scene: (scene.first[1], scene.second[1]),
    "colours": lambda scene: (scene.first[0], scene.second[0]),
    "relation": lambda scene: scene.relation,
    "background": lambda scene: scene.background,
}


def score(pictures: Iterable[np.ndarray], wanted: Iterable[Scene]) -> dict[str, float]:
    """Returns a dict of shares, each 0 to 1, of the `pictures` that show what they should: "all" has the share of
    pictures that equal the scene in `wanted`; "shapes", "colours", "relation" and "background" have the share of
    pictures in which this is right. Shapes and colours are compared from left to right, or from top to bottom."""
    pairs = [(judge(picture), scene.in_reading_order()) for picture, scene in zip(pictures, wanted, strict=True)]
    return {
        name: sum(seen is not None and part(seen) == part(scene) for seen, scene in pairs) / len(pairs)
        for name, part in _PARTS.items()
    }
