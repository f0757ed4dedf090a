"""Checks PSNR and SSIM, and how outputs of pipelines become pixels."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from octavo.comparing.image_metrics import as_pixels, mean_square, output_of, png, psnr, ssim


def picture(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (1, *shape, 3), dtype=np.uint8)


def test_psnr_of_a_constant_difference():
    a = np.full((1, 4, 5, 3), 100, np.uint8)
    assert psnr(mean_square(a, a + 5)) == pytest.approx(20 * math.log10(255 / 5))
    assert mean_square(a, a - 5) == mean_square(a - 5, a) == 25  # uint8 does not wrap around
    assert psnr(mean_square(a, a)) is None


def by_the_book(a: np.ndarray, b: np.ndarray) -> float:
    """Computes the SSIM of one channel window by window, as the paper defines it."""
    offsets = np.arange(-5, 6)
    weight = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    weight /= weight.sum()
    similarities = []
    for y in range(a.shape[0] - 10):
        for x in range(a.shape[1] - 10):
            p, q = (v[y : y + 11, x : x + 11].astype(float) for v in (a, b))
            mp, mq = (weight * p).sum(), (weight * q).sum()
            vp, vq = (weight * (p - mp) ** 2).sum(), (weight * (q - mq) ** 2).sum()
            both = (weight * (p - mp) * (q - mq)).sum()
            c1, c2 = 2.55**2, 7.65**2
            similarities.append((2 * mp * mq + c1) * (2 * both + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return float(np.mean(similarities))


def test_ssim_is_that_of_the_paper():
    a, b = picture(14, 13), picture(14, 13, seed=1)
    b[..., 0] = a[..., 0] // 2  # one channel is similar
    wanted = np.mean([by_the_book(a[0, :, :, c], b[0, :, :, c]) for c in range(3)])
    assert ssim(a, b) == pytest.approx(wanted, abs=1e-9)


def test_ssim_is_one_for_equal_pictures_symmetric_and_falls_with_noise():
    a = picture(20, 24) // 4 + 90
    noisy = [np.clip(a + np.random.default_rng(1).normal(0, s, a.shape), 0, 255).astype(np.uint8) for s in (2, 8, 30)]
    values = [ssim(a, b) for b in noisy]
    assert ssim(a, a) == pytest.approx(1.0)
    assert 1.0 > values[0] > values[1] > values[2]
    assert ssim(noisy[2], a) == pytest.approx(values[2])
    assert ssim(a[:, :10], a[:, :10]) is None  # no window fits


@pytest.mark.parametrize(
    ("latents", "shape"), [((1, 16, 4, 5), (1, 4, 5, 16)), ((1, 8, 3, 4, 5), (3, 4, 5, 8)), ((1, 6, 7), (1, 6, 7, 1))]
)
def test_outputs_have_frames_height_width_channels(latents, shape):
    output = torch.randn(latents)
    array = output_of((output,))
    assert array.shape == output_of(output).shape == shape
    a, b = as_pixels(array, array * 3, decoded=False)
    assert a.shape == b.shape == (*shape[:3], 3)
    if shape[-1] == 1:
        assert (a[..., 0].min(), a[..., 0].max()) == (0, 255)


def test_pictures_and_videos_keep_their_values():
    frames = picture(4, 6)[0]
    for output in (
        [frames / 255.0],
        [Image.fromarray(frames)],
        [[Image.fromarray(frames)] * 2],
        [np.stack([frames / 255.0] * 2)],
    ):
        arrays, _ = as_pixels(output_of((output,)), output_of((output,)), decoded=True)
        assert all(np.array_equal(frame, frames) for frame in arrays)
    assert png(frames) == png(frames.copy())


@pytest.mark.parametrize("kind", ["arrays", "pictures", "videos", "latents"])
def test_every_picture_of_a_batch_is_measured(kind):
    values = np.random.default_rng(0).integers(0, 256, (3, 5, 4, 3), dtype=np.uint8)
    pictures = [Image.fromarray(value) for value in values]
    latents = torch.from_numpy(values).permute(0, 3, 1, 2).float()
    outputs = {
        "arrays": values / 255.0,
        "pictures": pictures,
        "videos": [pictures[:2], pictures[2:]],
        "latents": latents,
    }
    arrays = output_of((outputs[kind],))
    assert np.allclose(arrays, values if kind == "latents" else values / 255.0)
