"""Marks cases that only `make test-all` runs."""

from collections.abc import Iterable
from typing import Any

import pytest


def marked(slow: Iterable[Any], values: Iterable[Any]) -> list[Any]:
    """Returns the values for parametrize. Values that are in `slow` too get pytest's marker `slow`."""
    return [pytest.param(value, marks=pytest.mark.slow) if value in slow else value for value in values]
