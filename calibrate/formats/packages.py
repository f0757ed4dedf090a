"""Checks whether the packages that a format needs, and a plain installation of Octavo lacks, are installed."""

from collections.abc import Iterable
from importlib.util import find_spec

from octavo.capture.errors import UsageError


def check_packages(what: str, packages: Iterable[str], extra: str) -> None:
    """Raises UsageError if one of `packages` is not installed. The message begins with `what`, the thing that needs the
    packages, and recommends Octavo's `extra`, which installs them."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise UsageError(f"{what}: {missing[0]} is not installed. Install octavo[{extra}].")
