"""Reads a 64x64 picture of the bundled pipeline: which shape, colour, size, place and background it shows.

Only pixels and geometry are used, no network. The background is the colour of the border. The region that differs from
the background is compared with a template of each shape, drawn with the area and the centroid of the region. The shape
whose template overlaps most with the region is the shape of the picture.
"""

from collections.abc import Iterable

import numpy as np

from .scene import CENTRES, COLOURS, PLACES, RADII, SHAPES, Scene, coverage

_PALETTE = np.array(list(COLOURS.values()), float)
_NAMES = list(COLOURS)
_GRID = np.arange(3.0, 19.0, 0.25)  # radii whose areas are tabulated
_AREAS = {shape: np.array([coverage(shape, 32.0, 32.0, r).sum() for r in _GRID]) for shape in SHAPES}


def _nearest(rgb: np.ndarray) -> int:
    return int(((_PALETTE - rgb) ** 2).sum(1).argmin())


def _median3(picture: np.ndarray) -> np.ndarray:
    """Replaces each pixel by the median of its 3x3 neighbourhood, which removes noise and keeps outlines. Beyond the
    border, the pixels of the border are repeated."""
    padded = np.pad(picture, ((1, 1), (1, 1), (0, 0)), mode="edge")
    height, width = picture.shape[:2]
    shifted = [padded[dy : dy + height, dx : dx + width] for dy in range(3) for dx in range(3)]
    return np.median(np.stack(shifted), axis=0)


def _largest_blob(mask: np.ndarray) -> np.ndarray:
    """Returns the largest 4-connected region of a boolean mask, as a mask."""
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
    blob: np.ndarray = labels == values[counts.argmax()]
    return blob


def judge(picture: np.ndarray) -> Scene | None:
    """Returns the scene that a (64, 64, 3) uint8 picture shows, None if no shape can be recognised."""
    smooth = _median3(picture.astype(float))
    border = np.concatenate([smooth[:2].reshape(-1, 3), smooth[-2:].reshape(-1, 3), smooth[:, 0], smooth[:, -1]])
    back = np.median(border, axis=0)
    distance = np.sqrt(((smooth - back) ** 2).sum(2))
    if (distance > 40).sum() < 12:
        return None
    blob = _largest_blob(distance > 40)
    front = np.median(smooth[blob & (distance >= np.quantile(distance[blob], 0.5))], axis=0)
    span = front - back
    # how far each pixel has gone from background to shape colour: soft coverage, (64, 64); the median filter
    # eats thin arms, so the coverage is taken from the picture itself, near the blob
    near = np.pad(blob, 2)
    near = np.max([near[dy : dy + 64, dx : dx + 64] for dy in range(5) for dx in range(5)], 0)
    mask = np.clip(((picture - back) @ span) / (span @ span), 0.0, 1.0) * near
    mask[mask < 0.25] = 0.0
    area = mask.sum()
    y, x = np.mgrid[:64, :64] + 0.5
    cx, cy = (mask * x).sum() / area, (mask * y).sum() / area
    overlap, shape, radius, top = -1.0, "", 0.0, 0.0
    for name in SHAPES:
        r = float(np.interp(area, _AREAS[name], _GRID))
        # the triangle's centroid lies below its origin: shift the template so that centroids agree
        offset = r / 6.0 if name == "triangle" else 0.0
        template = coverage(name, cx, cy - offset, r)
        score = np.minimum(mask, template).sum() / np.maximum(mask, template).sum()
        if score > overlap:
            overlap, shape, radius, top = score, name, r, cy - offset
    if overlap < 0.6:
        return None
    column = int(np.argmin([abs(cx - c) for c in CENTRES]))
    row = int(np.argmin([abs(top - c) for c in CENTRES]))
    place = next(name for name, cell in PLACES.items() if cell == (row, column))
    size = min(RADII, key=lambda name: abs(RADII[name] - radius))
    return Scene(size, _NAMES[_nearest(front)], shape, place, _NAMES[_nearest(back)])


def score(pictures: Iterable[np.ndarray], wanted: Iterable[Scene]) -> dict[str, float]:
    """Returns a dict of shares, each 0 to 1. A scene has five attributes, such as "colour"; the dict has for the name
    of each attribute the share of `pictures` that show it as wanted. Under "all" it has the share of pictures that show
    all five as wanted. `wanted` has the scene that each picture should show."""
    pairs = [(judge(picture), scene) for picture, scene in zip(pictures, wanted, strict=True)]
    names = ("shape", "colour", "size", "place", "background")
    right = {n: [seen is not None and getattr(seen, n) == getattr(scene, n) for seen, scene in pairs] for n in names}
    right["all"] = [seen == scene for seen, scene in pairs]
    return {name: sum(values) / len(values) for name, values in right.items()}
