"""Damaged files: flipped bits, truncations, and JSON with other values, all from a seed."""

import json
import random
from collections.abc import Iterator
from typing import Any

from octavo.capture.sealed import HEAD, MIDDLE, TAIL, digest_of

Changes = Iterator[tuple[str, bytes]]

# JSON texts that stand in the place of a value
VALUES = {
    "null": "null",
    "true": "true",
    "zero": "0",
    "negative": "-1",
    "half": "0.5",
    "huge": str(2**64),
    "many digits": "9" * 5000,
    "infinite": "1e999",
    "NaN": "NaN",
    "text": '"x"',
    "no text": '""',
    "escapes": '"\\u001b[31m\\u0000\\n\\u202e"',
    "half a pair": '"\\ud800"',
    "long text": '"' + "y" * 100_000 + '"',
    "list": "[]",
    "list of lists": "[[1], [[2]]]",
    "object": "{}",
    "objects": '{"a": {"b": [{}]}}',
    "deep list": "[" * 5000 + "]" * 5000,
    "deeper list": "[" * 200_000 + "]" * 200_000,
    "deep object": '{"a":' * 500 + "1" + "}" * 500,
}
WHOLE = {
    "nothing": b"",
    "no object": b"[1]",
    "text": b"hello",
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "BOM": b"\xef\xbb\xbf{}",
    "zeros": bytes(100),
    "bytes": bytes(range(256)),
    "half": b'{"a": ',
}
_HOLE = "\x7fhole\x7f"


def flipped(content: bytes, bit: int) -> bytes:
    """The content with one bit changed."""
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def bytes_changed(content: bytes, rng: random.Random) -> Changes:
    """Yields (what was done, content) for changes that know nothing of the format."""
    size = len(content)
    place = rng.randrange(max(1, size - 64))
    yield "flip", flipped(content, rng.randrange(8 * size))
    yield "one byte less", content[:-1]
    yield "half", content[: size // 2]
    yield "nine bytes", content[:9]
    yield "one byte more", content + b"\0"
    yield "twice", content + content
    yield "zeros", content[:place] + bytes(len(content[place : place + 64])) + content[place + 64 :]
    yield "all zeros", bytes(size)
    yield "swap", content[place:] + content[:place]


def json_changed(content: bytes, rng: random.Random, count: int) -> Changes:
    """Yields (what was done, content) for JSON with another value at `count` random places for each of VALUES, with a
    key that is lost or stands twice, and for what is no JSON object."""
    value = json.loads(content)
    for name, text in VALUES.items():
        for _ in range(count):
            path = _place(value, rng)
            yield f"{name} at {path}", _with(value, path, _HOLE, text)
    for _ in range(count):
        path = _place(value, rng)
        yield f"without {path}", _without(value, path)
        text = json.dumps(value)
        key = next(iter(value), "a")
        yield "twice", f'{{"{key}": 0, {text[1:]}'.encode()
    yield from WHOLE.items()


def sealed_changed(content: bytes, rng: random.Random, count: int) -> Changes:
    """Yields what `json_changed` yields for the body of a sealed file, sealed again."""
    body = content[len(HEAD) + 64 + len(MIDDLE) : -len(TAIL)]
    for name, changed in json_changed(body, rng, count):
        yield name, resealed(changed)


def resealed(body: bytes) -> bytes:
    """A sealed file with this body, canonical JSON or not."""
    return HEAD + digest_of(body).encode() + MIDDLE + body + TAIL


def header_changed(content: bytes, rng: random.Random, count: int) -> Changes:
    """Yields (what was done, content) for a safetensors file with another header."""
    length = int.from_bytes(content[:8], "little")
    for name, header in json_changed(content[8 : 8 + length], rng, count):
        yield f"header: {name}", len(header).to_bytes(8, "little") + header + content[8 + length :]
    for wrong in (0, 1, length - 1, length + 1, 2**31, 2**63):
        yield f"header of {wrong} bytes", wrong.to_bytes(8, "little") + content[8:]


def _place(value: Any, rng: random.Random) -> list[Any]:
    """A random path into a value."""
    path: list[Any] = []
    while isinstance(value, (dict, list)) and value and (not path or rng.random() < 0.8):
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        path.append(key)
        value = value[key]
    return path


def _with(value: Any, path: list[Any], hole: str, text: str) -> bytes:
    copy = json.loads(json.dumps(value))
    if not path:
        return text.encode()
    owner = copy
    for key in path[:-1]:
        owner = owner[key]
    owner[path[-1]] = hole
    return json.dumps(copy).replace(json.dumps(hole), text).encode()


def _without(value: Any, path: list[Any]) -> bytes:
    copy = json.loads(json.dumps(value))
    owner = copy
    for key in path[:-1]:
        owner = owner[key]
    if path:
        del owner[path[-1]]
    return json.dumps(copy).encode()
