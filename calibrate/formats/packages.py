"""Checks for packages that a format needs besides Octavo's own."""

from collections.abc import Iterable
from importlib.util import find_spec

from octavo.capture.errors import UsageError


def check_packages(what: str, packages: Iterable[str], extra: str) -> None:
    """Raises UsageError where `packages` that `what` needs are not installed; Octavo's `extra` installs them."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise UsageError(f"{what}: {missing[0]} is not installed. Install octavo[{extra}].")
