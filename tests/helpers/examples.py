"""How many examples a property is tried on, and at how many calls a fault is tried."""

import random

from hypothesis import settings

EVERYTHING = "all"  # the profile of `make test-all`: pytest --hypothesis-profile=all
settings.register_profile(EVERYTHING)


def examples(count: int, few: int = 100) -> settings:
    """Settings of a property that is tried on `count` examples by `make test-all` and on at most `few` otherwise."""
    return settings(max_examples=count if _all() else min(count, few), deadline=None)


def some_of(count: int) -> list[int]:
    """The calls, of `count`, at which a fault is tried: all by `make test-all`, otherwise a third that is always the
    same, drawn at random because calls repeat in a fixed order, and the first and the last."""
    drawn = random.Random(0).sample(range(count), count // 3)
    return list(range(count)) if _all() else sorted({0, *drawn, count - 1})


def _all() -> bool:
    return settings.get_current_profile_name() == EVERYTHING
