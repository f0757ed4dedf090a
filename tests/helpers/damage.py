"""Damaged files: flipped bits, truncations, and JSON with other values. All damage follows from a seed."""

import json
import random
from collections.abc import Iterator
from typing import Any

from octavo.capture.sealed import HEAD, MIDDLE, TAIL, digest_of

Changes = Iterator[tuple[str, bytes]]

# JSON texts that replace a value
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
    """Returns the content with one bit flipped."""
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def bytes_changed(content: bytes, rng: random.Random) -> Changes:
    """Yields (name of the change, content) for changes that do not depend on the format."""
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
    """Yields (name of the change, content) for damaged JSON.

    Each value of VALUES is put in `count` random places. `count` times, one entry is removed, and the first key is
    duplicated. Last come the contents of WHOLE, none of which is a JSON object in UTF-8.
    """
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
    """Returns a sealed file with this body, whether or not the body is canonical JSON."""
    return HEAD + digest_of(body).encode() + MIDDLE + body + TAIL


def header_changed(content: bytes, rng: random.Random, count: int) -> Changes:
    """Yields (name of the change, content) for a safetensors file with a damaged header."""
    length = int.from_bytes(content[:8], "little")
    for name, header in json_changed(content[8 : 8 + length], rng, count):
        yield f"header: {name}", len(header).to_bytes(8, "little") + header + content[8 + length :]
    for wrong in (0, 1, length - 1, length + 1, 2**31, 2**63):
        yield f"header of {wrong} bytes", wrong.to_bytes(8, "little") + content[8:]


def _place(value: Any, rng: random.Random) -> list[Any]:
    """Returns a random path into a value."""
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
