"""Checks that contents that make no sense are refused although their checksums are right."""

import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from octavo.capture.files import write_sealed
from octavo.capture.sealed import digest_of, read_sealed

from ...helpers.faults import fast_path
from ...helpers.stores import make_store, refused_read, remedy, unit_of

__all__ = ["fast_path"]


def reseal(store: Path, change: Callable[[dict[str, Any]], None], index: int = 0) -> None:
    """Changes a unit.json and updates every checksum that covers it."""
    path = unit_of(store, index) / "unit.json"
    body = read_sealed(path).body
    change(body)
    digest = write_sealed(path, body, 0o600)
    listing = read_sealed(store / "complete.json").body
    listing["units"][path.parent.name] = digest
    write_sealed(store / "complete.json", listing, 0o600)


def replace_data(store: Path, data: bytes, header: bytes | None = None) -> None:
    """Replaces the first unit's data file by `data`, and updates unit.json to match."""
    path = unit_of(store) / "data-000.safetensors"
    path.chmod(0o600)
    path.write_bytes(data)
    if header is None:
        header = data[: 8 + int.from_bytes(data[:8], "little")]

    def change(body: dict[str, Any]) -> None:
        body["parts"][0] |= {"bytes": len(data), "header": digest_of(header)}

    reseal(store, change)


def safetensors(entries: Any, data: bytes, pad: bytes = b"") -> bytes:
    text = (entries if isinstance(entries, bytes) else json.dumps(entries).encode()) + pad
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


KEY = "0" * 64
HEADERS: dict[str, bytes] = {
    "no header": b"",
    "short length": b"\1\2\3",
    "length 0": struct.pack("<Q", 0) + b"x" * 8,
    "length 2^63": struct.pack("<Q", 2**63) + b"x" * 100,
    "length 2^64-1": struct.pack("<Q", 2**64 - 1) + b"x" * 100,
    "length 100 MB + 1": struct.pack("<Q", 10**8 + 1) + b"x" * 100,
    "length beyond the file": struct.pack("<Q", 101) + b"x" * 100,
    "not JSON": safetensors(b"{]", b""),
    "a list": safetensors([], b""),
    "a number": safetensors(b"1", b""),
    "nested 100000 deep": safetensors(b"[" * 100_000, b""),
    "not UTF-8": safetensors(b'{"\xff": 1}', b""),
    "no entries": safetensors({}, b""),
    "entries without data": safetensors({KEY: entry()}, b""),
    "gap": safetensors({KEY: entry(offsets=(4, 12))}, b"x" * 12),
    "overlap": safetensors({KEY: entry(), "1" * 64: entry()}, b"x" * 8),
    "duplicate name": safetensors(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), b"x" * 8),
    "bytes of nobody": safetensors({KEY: entry()}, b"x" * 9),
    "unknown dtype": safetensors({KEY: entry("Q8")}, b"x" * 8),
    "dtype list": safetensors({KEY: entry([])}, b"x" * 8),  # type: ignore[arg-type]
    "shape too large": safetensors({KEY: entry(shape=(2**62, 4))}, b"x" * 8),
    "shape negative": safetensors({KEY: entry(shape=(-2, -1))}, b"x" * 8),
    "shape float": safetensors({KEY: entry(shape=(2.0,))}, b"x" * 8),
    "shape number": safetensors({KEY: entry(shape=2)}, b"x" * 8),
    "shape null": safetensors({KEY: entry(shape=None)}, b"x" * 8),
    "offsets reversed": safetensors({KEY: entry(offsets=(8, 0))}, b"x" * 8),
    "offsets negative": safetensors({KEY: entry(offsets=(-8, 0))}, b"x" * 8),
    "offsets three": safetensors({KEY: entry(offsets=(0, 8, 8))}, b"x" * 8),
    "offsets beyond": safetensors({KEY: entry(offsets=(0, 2**60))}, b"x" * 8),
    "entry list": safetensors({KEY: []}, b"x" * 8),
    "zero-size reuse": safetensors({KEY: entry(shape=(0,), offsets=(0, 0)), "1" * 64: entry()}, b"x" * 8),
    "sound but foreign": safetensors({KEY: entry()}, b"x" * 8),
}


@pytest.mark.parametrize("name", HEADERS)
def test_malformed_data_files_are_refused(tmp_path: Path, name: str) -> None:
    store = make_store(tmp_path, 1)
    replace_data(store, HEADERS[name])
    tracemalloc.start()
    try:
        message = refused_read(store)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    assert message.endswith(remedy(unit_of(store)))


def test_a_header_above_16_mib_is_not_read(tmp_path: Path) -> None:
    store = make_store(tmp_path, 1)
    length = (16 << 20) + 1
    header = struct.pack("<Q", length) + b" " * length
    replace_data(store, header, header)
    assert f"damaged (its header claims {length} bytes, but" in refused_read(store)


def test_control_the_library_takes_some_malformed_files(tmp_path: Path) -> None:
    names = []
    for name, data in HEADERS.items():
        path = tmp_path / "f.safetensors"
        path.write_bytes(data)
        try:
            with safe_open(path, "pt") as file:
                [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118 - it is not a dict
            names.append(name)
        except Exception:
            path.unlink()
    assert {"no entries", "zero-size reuse", "sound but foreign"} <= set(names)


def set_at(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    *way, last = [int(name) if name.lstrip("-").isdigit() else name for name in path.split("/")]

    def change(body: Any) -> None:
        for name in way:
            body = body[name]
        body[last] = value

    return change


FIRST = "calls/0/kwargs/0"
BODIES: dict[str, list[Any]] = {
    **{name: [None, [1], "x"] for name in ("index", "info", "calls", "parts", "blobs", "tensors")},
    "calls/0": [None, [], {}, 7],
    "calls/0/timestep": [{}],
    "calls/0/index": ["x"],
    "calls/0/component": [1],
    "calls/0/args": [{"a": 1}, None, 7],
    FIRST: [None, ["x"], ["hidden_states", {"tensor": 10**9}], [1, {"evil": 1}]],
    f"{FIRST}/1": [{"tensor": "x"}, {"tensor": None}, {"dict": 3}, {"dtype": "save"}, {"dict": [[[], 1]]}, {}],
    "calls/1/kwargs/0/1": [{"Size": [{}]}, {"device": "evil"}, {"numpy": ["O", "00"]}, {"float": "1"}, {"tuple": 1}],
    "tensors/0/0": ["F64", "evil", [], None],
    "tensors/0/1": [[2**62, 4], [-1], None, [2.0], ["x"], [], [2**40, 8, 8, 8]],
    "tensors/0/2": [["0" * 64], None, [], [[]], 3],
    "parts/0/file": ["../../capture.json", "/etc/passwd", "unit.json", None, "data-000"],
    "parts/0/bytes": [-1, 2**70, None],
    "parts/0/header": ["x", None],
}


@pytest.mark.parametrize(("path", "value"), [(path, value) for path in BODIES for value in BODIES[path]])
def test_a_resealed_unit_that_makes_no_sense_is_refused(tmp_path: Path, path: str, value: Any) -> None:
    store = make_store(tmp_path, 1)
    reseal(store, set_at(path, value))
    assert refused_read(store).startswith("/units/")
