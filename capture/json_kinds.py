"""Checks the types of values read from JSON files, before the program relies on them.

A kind is a function `kind(value, where)` that raises ValueError if `value` has the wrong type. `where` is the name of
the value, for the message. Kinds are combined as in `list_of(maybe(number))`.
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

DEEPEST = 64  # most levels of nested objects and lists that are read; the deepest file that Octavo writes has 8
_LARGEST = 2**63  # whole numbers of this size or more are refused as counts: they do not fit into an int64
_LAYERS = re.compile(r"(\w+_)?(layers?|blocks?|depths?)(_per_\w+)?")  # keys of a model's config that count layers
_GREATEST = sys.float_info.max  # a larger whole number cannot be converted to a float


def parse_json(content: bytes, *, finite: bool = True) -> Any:
    """Parses UTF-8 JSON, more strictly than the json module does.

    Raises ValueError for anything that is not UTF-8 JSON, for an object with the same key twice, for text that UTF-8
    cannot encode, for more than 64 (DEEPEST) levels of nesting and, with `finite`, for NaN and infinite numbers.
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
    """Raises ValueError if `value`, the JSON parsed from `content`, has text that UTF-8 cannot encode.

    Such text has one half of a surrogate pair, and printing it would fail. `content` is searched for such halves first,
    which is faster.
    """
    if b"\\ud" in content.lower():
        json.dumps(value, ensure_ascii=False).encode()  # raises UnicodeEncodeError, a ValueError


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} occurs twice in an object")
    return entries


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
            for item in level
            if isinstance(item, (dict, list))
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return
    raise ValueError("nested too deeply")


def checked(value: Any, kind: Kind, path: Path, remedy: str = "") -> Any:
    """Returns `value`, which was read from the file at `path`, if the check `kind` accepts it; else raises FileError.

    `remedy` ends the message and says what the user can do.
    """
    try:
        kind(value, "")
    except ValueError as error:
        raise damage(path, f"damaged ({error})", remedy) from None
    return value


def _refusal(value: Any, where: str, what: str) -> ValueError:
    return ValueError(f"{where.lstrip('.') or 'the content'} is {json.dumps(value)[:40]}, not {what}")


def text(value: Any, where: str) -> None:
    """Checks that `value` is a string. Else raises ValueError, whose message calls the value `where`."""
    if not isinstance(value, str):
        raise _refusal(value, where, "text")


def number(value: Any, where: str) -> None:
    """Checks that `value` is a finite number. Else raises ValueError, whose message calls the value `where`."""
    if type(value) not in (int, float) or not abs(value) <= _GREATEST:  # False for NaN
        raise _refusal(value, where, "a number")


def count(value: Any, where: str) -> None:
    """Checks that `value` is a whole number from 0 to 2^63 - 1.

    Else raises ValueError, whose message calls the value `where`.
    """
    if type(value) is not int or not 0 <= value < _LARGEST:
        raise _refusal(value, where, "a whole number from 0 to 2^63 - 1")


def maybe(kind: Kind) -> Kind:
    """Makes a check that accepts null and every value that the check `kind` accepts."""

    def check(value: Any, where: str) -> None:
        if value is not None:
            kind(value, where)

    return check


def list_of(kind: Kind, length: int | None = None) -> Kind:
    """Makes a check that accepts lists of values that the check `kind` accepts; with `length`, only of that length."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, list) or length not in (None, len(value)):
            raise _refusal(value, where, "a list" if length is None else f"a list of {length}")
        for index, item in enumerate(value):
            kind(item, f"{where}[{index}]")

    return check


def object_of(kind: Kind) -> Kind:
    """Makes a check that accepts JSON objects with any keys, if the check `kind` accepts each of their values."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise _refusal(value, where, "an object")
        for name, item in value.items():
            kind(item, f"{where}.{name[:80]}")

    return check


def fields(needed: Mapping[str, Kind], optional: Mapping[str, Kind] | None = None) -> Kind:
    """Makes a check that accepts JSON objects that have all keys of `needed` and may have the keys of `optional`.

    `needed` and `optional` map each key to the check of its value. Other keys are ignored.
    """

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


def one_of(*kinds: Kind) -> Kind:
    """Makes a check that accepts a value if at least one of the checks `kinds` accepts it."""

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
    """Raises FileError if the config of a model claims more layers or blocks than its weight files have tensors.

    Such a config is damaged, and building that many layers could fill the memory. `path` is the file of the config,
    `count` the number of tensors in the weight files.
    """
    for key, value in config.items():
        if _LAYERS.fullmatch(key):
            claims = value if isinstance(value, list) else [value]
            if any(isinstance(claim, int | float) and not claim <= count for claim in claims):  # also true for NaN
                fact = f"{key} is {str(value)[:40]}, but the weight files hold only {count} tensors"
                raise damage(path, fact, "Copy the model again.")
        elif isinstance(value, dict):
            check_layers(value, count, path)
