"""Numbers of examples for a property, and of calls at which a fault is tried: fewer by default than in `make
test-all`."""

import random

from hypothesis import settings

EVERYTHING = "all"  # the profile of `make test-all`: pytest --hypothesis-profile=all
settings.register_profile(EVERYTHING)


def examples(count: int, few: int = 100) -> settings:
    """Returns settings for `count` examples of a property in `make test-all`, and for at most `few` otherwise."""
    return settings(max_examples=count if _all() else min(count, few), deadline=None)


def some_of(count: int) -> list[int]:
    """Returns the indices of the calls, out of `count`, at which a fault is tried.

    `make test-all` tries all calls. Otherwise it is the first, the last and a third of the calls, which is always the
    same. The third is random because calls repeat in a fixed order.
    """
    drawn = random.Random(0).sample(range(count), count // 3)
    return list(range(count)) if _all() else sorted({0, *drawn, count - 1})


def _all() -> bool:
    return settings.get_current_profile_name() == EVERYTHING
