"""Checks the tables of sizes and durations of Open-Sora, which need no torch."""

import subprocess
import sys

import pytest

from octavo.pipelines.opensora import (
    ASPECTS,
    RESOLUTIONS,
    VideoSettings,
    frame_count,
    latent_frames,
    latent_size,
    video_size,
)

from ...helpers.refusals import refused


def test_the_tables_hold_seventeen_aspects_of_six_resolutions() -> None:
    assert (len(ASPECTS), len(RESOLUTIONS)) == (17, 6)
    for aspect in ASPECTS:
        rows, columns = map(int, aspect.split(":"))
        for resolution in RESOLUTIONS:
            height, width = video_size(resolution, aspect)
            assert height / width == pytest.approx(rows / columns, rel=0.15)


def test_tabled_sizes() -> None:
    assert video_size("240p", "9:16") == (240, 426)
    assert video_size("1080p", "3:8") == (882, 2352)
    assert video_size("480p", "12:25") == (444, 925)
    assert video_size("144p", "50:27") == (277, 132)


@pytest.mark.parametrize(
    ("frames", "latents"),
    [(1, 1), (16, 4), (17, 5), (51, 15), (68, 20), (102, 30), (204, 60), (408, 120), (18, 6), (34, 10)],
)
def test_latent_frames(frames: int, latents: int) -> None:
    assert latent_frames(frames) == latents


def test_latents_round_down() -> None:
    assert latent_size(240, 426, 51) == (15, 30, 53)
    assert VideoSettings().latents == (15, 30, 53)
    assert VideoSettings("480p", "9:16", "4s").latents == (30, 60, 106)


def test_durations_have_names() -> None:
    assert [frame_count(name) for name in ("2s", "1x", "32s", "image", "68", 17)] == [51, 51, 816, 1, 68, 17]


@pytest.mark.parametrize("call", [lambda: video_size("241p", "9:16"), lambda: video_size("240p", "16:10")])
def test_unknown_sizes_are_usage_errors_that_list_the_known(call: object) -> None:
    refused(call, 2, "Use one of")


@pytest.mark.parametrize("frames", ["", "soon", 0, -3])
def test_invalid_durations_are_refused(frames: int | str) -> None:
    refused(lambda: frame_count(frames), 2, "frames")


def test_sizes_and_defaults_need_no_torch() -> None:
    code = "import sys, pipelines.opensora as o; o.VideoSettings().latents, o.KEEP_FLOAT; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
