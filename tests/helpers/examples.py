"""How many examples a property is tried on, and at how many places a fault is tried."""

from hypothesis import settings

EVERYTHING = "all"  # the profile of `make test-all`: pytest --hypothesis-profile=all
settings.register_profile(EVERYTHING)


def examples(count: int, few: int = 100) -> settings:
    """Settings of a property that is tried on `count` examples by `make test-all` and on at most `few` otherwise."""
    whole = settings.get_current_profile_name() == EVERYTHING
    return settings(max_examples=count if whole else min(count, few), deadline=None)
