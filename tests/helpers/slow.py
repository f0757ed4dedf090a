"""Cases of a test that are for `make test-all`."""

from collections.abc import Iterable
from typing import Any

import pytest


def marked(slow: Iterable[Any], values: Iterable[Any]) -> list[Any]:
    """The values to parametrize a test with; those that are in `slow` too have the mark of that name."""
    return [pytest.param(value, marks=pytest.mark.slow) if value in slow else value for value in values]
