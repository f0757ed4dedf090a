"""Checks of refusals: an OctavoError with the expected exit code and a message of one line."""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest

from octavo.capture.errors import OctavoError


def refused(call: Callable[[], Any], code: int, *words: str | re.Pattern[str]) -> str:
    """Checks that `call` raises an OctavoError with this exit code, whose message is one line and holds every word.

    A word may be a compiled pattern. Returns the message.
    """
    with pytest.raises(OctavoError) as caught:
        call()
    message = str(caught.value)
    assert caught.value.exit_code == code, f"exit code {caught.value.exit_code}, not {code}: {message}"
    assert len(message.splitlines()) == 1, f"not one line: {message!r}"
    for word in words:
        assert re.search(re.escape(word) if isinstance(word, str) else word, message), f"no {word!r} in: {message}"
    return message


def enter_and_leave(context: AbstractContextManager[Any]) -> None:
    """Runs a `with` block that does nothing, for contexts that refuse to be entered or left."""
    with context:
        pass


def error_of(call: Callable[[], Any], code: int) -> str | None:
    """Returns the message of the OctavoError that `call` raises, which must have this exit code, or None if `call`
    returns."""
    try:
        call()
    except OctavoError:
        return refused(call, code)
    return None
