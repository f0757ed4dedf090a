"""Kinds of JSON values, to check what a file holds before the program relies on it.

A kind is a function that takes a value and its name, and raises ValueError for a value that does not fit, naming it.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import damage

Kind = Callable[[Any, str], None]

DEEPEST = 64  # levels of nested objects and lists that are read; the deepest file that Octavo writes has 8
_LARGEST = 2**63  # whole numbers from here on are no sizes or counts of anything
_LAYERS = re.compile(r"(\w+_)?(layers?|blocks?|depths?)(_per_\w+)?")  # keys of a config that count layers
_GREATEST = sys.float_info.max  # a larger whole number is no float


def parse_json(content: bytes, *, finite: bool = True) -> Any:
    """Parses UTF-8 JSON. Raises ValueError for anything else, for objects that have a key twice, for text that UTF-8
    cannot hold, for more than DEEPEST levels, and with `finite` for numbers that are not.
    """
    try:
        value = json.loads(
            content.decode(),
            object_pairs_hook=_object,
            parse_constant=_infinite if finite else float,
            parse_float=_finite if finite else float,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _check_depth(value)
    check_characters(value, content)
    return value


def check_characters(value: Any, content: bytes) -> None:
    """Raises ValueError where the JSON `value` parsed from `content` has text that UTF-8 cannot hold: half a pair of
    surrogates, which could not be printed."""
    if b"\\ud" in content.lower():
        json.dumps(value, ensure_ascii=False).encode()  # raises UnicodeEncodeError, a ValueError


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice in an object")
    return found


def _infinite(text: str) -> float:
    raise ValueError(f"{text} is not a number")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _infinite(text[:20])


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for each in level
            if isinstance(each, (dict, list))
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return
    raise ValueError("nested too deeply")


def checked(value: Any, kind: Kind, path: Path, remedy: str = "") -> Any:
    """Returns the `value` read from the file at `path`. Raises FileError unless it is of this kind."""
    try:
        kind(value, "")
    except ValueError as error:
        raise damage(path, f"damaged ({error})", remedy) from None
    return value


def _refusal(value: Any, where: str, what: str) -> ValueError:
    return ValueError(f"{where.lstrip('.') or 'the content'} is {json.dumps(value)[:40]}, not {what}")


def text(value: Any, where: str) -> None:
    """A string."""
    if not isinstance(value, str):
        raise _refusal(value, where, "text")


def number(value: Any, where: str) -> None:
    """A finite number."""
    if type(value) not in (int, float) or not abs(value) <= _GREATEST:  # False for NaN
        raise _refusal(value, where, "a number")


def count(value: Any, where: str) -> None:
    """A whole number of 0 or more."""
    if type(value) is not int or not 0 <= value < _LARGEST:
        raise _refusal(value, where, "a count")


def maybe(kind: Kind) -> Kind:
    """A value of this kind, or null."""

    def check(value: Any, where: str) -> None:
        if value is not None:
            kind(value, where)

    return check


def list_of(kind: Kind, length: int | None = None) -> Kind:
    """A list of values of this kind, of this length."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, list) or length not in (None, len(value)):
            raise _refusal(value, where, "a list" if length is None else f"a list of {length}")
        for index, each in enumerate(value):
            kind(each, f"{where}[{index}]")

    return check


def object_of(kind: Kind) -> Kind:
    """An object with any keys, whose values are of this kind."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise _refusal(value, where, "an object")
        for name, each in value.items():
            kind(each, f"{where}.{name[:80]}")

    return check


def fields(needed: Mapping[str, Kind], optional: Mapping[str, Kind] | None = None) -> Kind:
    """An object that has the keys `needed` and may have those of `optional`; other keys are not looked at."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise _refusal(value, where, "an object")
        for name, kind in needed.items():
            if name not in value:
                raise ValueError(f"{where.lstrip('.') or 'the content'} has no {name}")
            kind(value[name], f"{where}.{name}")
        for name, kind in (optional or {}).items():
            if name in value:
                kind(value[name], f"{where}.{name}")

    return check


def either(*kinds: Kind) -> Kind:
    """A value of one of these kinds."""

    def check(value: Any, where: str) -> None:
        errors = []
        for kind in kinds:
            try:
                return kind(value, where)
            except ValueError as error:
                errors.append(error)
        raise errors[0]

    return check


def check_layers(config: Mapping[str, Any], count: int, path: Path) -> None:
    """Raises FileError when the config of a model, read from `path`, claims more layers or blocks than the weight files
    beside it hold tensors, `count`: a model of as many layers would be built first."""
    for key, value in config.items():
        if _LAYERS.fullmatch(key):
            claims = value if isinstance(value, list) else [value]
            if any(isinstance(each, int | float) and not each <= count for each in claims):  # NaN too
                fact = f"{key} is {str(value)[:40]}, and the weight files hold {count} tensors"
                raise damage(path, fact, "Copy the model anew.")
        elif isinstance(value, dict):
            check_layers(value, count, path)
