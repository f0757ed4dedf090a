"""Fixtures shared by the tests."""

import gc
from collections.abc import Callable
from functools import cache
from itertools import count
from pathlib import Path

import pytest

from .helpers import examples  # registers the Hypothesis profile before a command line asks for it

__all__ = ["examples"]


def pytest_collection_finish() -> None:
    """Takes the half million objects of imported libraries out of the garbage collector: collecting through them takes
    half a second each time, and makes forked processes copy the pages that hold them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a whole SD3 pipeline of random weights, text encoders and tokenizers included. Read only."""
    from .zoo.whole_sd3 import whole_sd3

    return whole_sd3(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def captured(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A capture of `tiny_model`: three prompts in three steps of 16 x 16 pixels, 9 calls. Read only."""
    from .helpers.commands import capture

    folder = tmp_path_factory.mktemp("captured")
    prompts = folder / "prompts.txt"
    prompts.write_text("a red circle\na blue ring\na white cross")
    capture(tiny_model, folder / "capture", prompts)
    return folder / "capture"


@pytest.fixture(scope="session")
def checkpoint(captured: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Calibrates `captured` with the options of the command that are given, each list of options once. Read only."""
    from .helpers.commands import octavo

    folder, numbers = tmp_path_factory.mktemp("checkpoints"), count()

    @cache
    def made(*options: str) -> Path:
        out = folder / f"w8a8-{next(numbers)}"
        octavo("calibrate", captured, out, *options)
        return out

    return made
