"""Checks that reading a capture gives the stored calls or one OctavoError, whatever happened to the files."""

import os
import random
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from octavo.capture.errors import OctavoError
from octavo.capture.files import write_sealed
from octavo.capture.store import reader as reader_module
from octavo.capture.store.reader import Capture
from octavo.capture.store.writer import CaptureWriter

from ...helpers.faults import fast_path
from ...helpers.refusals import refused
from ...helpers.stores import (
    MANIFEST,
    PLANNED,
    calls_of,
    files_of,
    fill,
    make_store,
    refused_read,
    remedy,
    same,
    unit_of,
)

__all__ = ["fast_path"]


# Reading a sound capture


def test_calls_come_back_in_order_and_by_choice(tmp_path: Path) -> None:
    capture = Capture.open(make_store(tmp_path))
    assert (capture.manifest, [unit.index for unit in capture.units]) == (MANIFEST, [0, 1, 2])
    every = [call for unit in range(3) for call in calls_of(unit)]
    for _ in range(2):
        assert all(map(same, capture.calls(), every))
    assert [call.step for call in capture.calls(units=[1, 2], where=lambda header: header.step == 1)] == [1, 1]
    assert len(list(capture.calls("transformer"))) == 6
    assert not list(capture.calls("unet"))
    assert [header.timestep for header in capture.units[0].calls] == [999.0, 998.0]


def test_what_is_read_may_be_changed(tmp_path: Path) -> None:
    capture = Capture.open(make_store(tmp_path))
    expected = [call for unit in range(3) for call in calls_of(unit)]
    for stored_call, call in zip(capture.calls(), expected, strict=True):
        assert same(stored_call, call)
        for tensor in stored_call.kwargs.values():
            if isinstance(tensor, torch.Tensor):
                tensor.zero_()


def test_descriptions_read_no_data(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    descriptions = list(Capture.open(store).descriptions())
    first = descriptions[0].kwargs["hidden_states"]
    expected = calls_of(0)[0].kwargs["hidden_states"]
    assert (first.dtype, first.shape) == ("float32", expected.shape)
    assert (first.stats.minimum, first.stats.maximum) == (expected.min().item(), expected.max().item())
    assert descriptions[0].kwargs["added"]["sizes"] == (1, 2.5, [True])


def test_the_memory_is_that_of_one_call(fast_path: Path) -> None:
    with CaptureWriter.create(fast_path / "c", MANIFEST) as writer:
        with writer.unit(0, {}) as unit:
            for call in calls_of(0, steps=20):
                unit.add(call)
            del call
        writer.complete()
    before: list[weakref.ref[torch.Tensor]] = []
    for call in Capture.open(fast_path / "c").calls():
        assert not any(reference() is not None for reference in before)
        before.append(weakref.ref(call.kwargs["hidden_states"]))
        del call
    assert len(before) == 20


def test_other_tools_can_read_the_data(tmp_path: Path) -> None:
    path = unit_of(make_store(tmp_path)) / "data-000.safetensors"
    with safe_open(path, "pt") as file:
        stored = {tuple(file.get_tensor(key).shape) for key in file.keys()}  # noqa: SIM118 - it is not a dict
    assert stored == {(8, 8, 8), (5, 128), (2,), (2, 2)}


# Unfinished, damaged and foreign captures


def test_a_directory_without_a_capture_is_refused(tmp_path: Path) -> None:
    assert refused_read(tmp_path) == ": not a capture (no capture.json). Make a capture with octavo capture."
    assert refused_read(tmp_path / "no") == ": no such capture. Make a capture with octavo capture."


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    write_sealed(tmp_path / "capture.json", {"schema": 3, "anything": []}, 0o600)
    assert refused_read(tmp_path) == ": has layout 3, but this version reads 1. Upgrade Octavo."


def test_an_unfinished_capture_is_refused_unless_allowed(tmp_path: Path) -> None:
    with CaptureWriter.create(tmp_path, PLANNED) as writer:
        fill(writer, range(2))
    expected = ": capture not finished (2 of 50 prompts). Finish with capture --resume or pass --allow-incomplete."
    assert refused_read(tmp_path, 4) == expected
    assert len(list(Capture.open(tmp_path, allow_incomplete=True).calls())) == 4


def test_a_capture_without_samples_is_refused(tmp_path: Path) -> None:
    with CaptureWriter.create(tmp_path, PLANNED) as writer:
        writer.complete()
    assert refused_read(tmp_path, 4) == ": holds no calls. Capture again."


MISSING = {
    "capture.json": "not a capture",
    "complete.json": "not finished",
    "units": "/units: missing",
    "unit": "missing. Run capture --resume.",
    "unit.json": "/unit.json: missing. Delete",
    "data-000.safetensors": "/data-000.safetensors: missing. Delete",
}


@pytest.mark.parametrize("name", MISSING)
def test_each_kind_of_missing_file_is_named(tmp_path: Path, name: str) -> None:
    store = make_store(tmp_path)
    path = unit_of(store, 1) if name == "unit" else next(store.rglob(name))
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert MISSING[name] in refused_read(store, 4 if name == "complete.json" else 3)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[:-1],
    "appended": lambda data: data + b"\0",
    "zeroed": lambda data: bytes(len(data)),
    "flipped": lambda data: data[:-9] + bytes([data[-9] ^ 4]) + data[-8:],
    "pickle": lambda data: b"\x80\x04cposix\nsystem\n.".ljust(len(data), b"."),
    "emptied": lambda data: b"",
}


@pytest.mark.parametrize("name", ["data-000.safetensors", "unit.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_names_the_unit_to_delete(tmp_path: Path, damage: str, name: str) -> None:
    store = make_store(tmp_path)
    path = unit_of(store, 1) / name
    path.chmod(0o600)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    message = refused_read(store)
    assert message.startswith(f"/units/{path.parent.name}/{name}: damaged (")
    assert message.endswith(remedy(path.parent))


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Returns the data with one random change of bytes or of length."""
    position, size = chance.randrange(len(data)), chance.choice([1, 1, 1, 8, 64])
    noise = chance.randbytes(size)
    return chance.choice(
        [
            lambda: data[:position] + bytes([data[position] ^ 1 << chance.randrange(8)]) + data[position + 1 :],
            lambda: data[:position] + noise + data[position + size :],
            lambda: data[:position] + bytes(size) + data[position + size :],
            lambda: data[:position],
            lambda: data + noise,
            lambda: data[:position] + noise + data[position:],
            lambda: data[:position] + data[position + size :],
            lambda: data[:position] + data[:position][-size:] + data[position + size :],
            lambda: data[:position] + data[position:].swapcase(),
            lambda: b"",
        ]
    )()


def survivors(store: Path, count: int) -> list[str]:
    """Makes `count` mutations, spread over all files, and lists those that reading did not refuse with exit code 3 and
    the path. An error that is no OctavoError is not caught."""
    chance = random.Random(0)
    files = {path: path.read_bytes() for path in files_of(store)}
    for path in files:
        path.chmod(0o600)
    silent = []
    for number in range(count):
        path = list(files)[number % len(files)]
        data = mutated(files[path], chance)
        if data == files[path]:
            continue
        path.write_bytes(data)
        try:
            capture = Capture.open(store)
            capture.verify() if number % 2 else list(capture.calls())
            silent.append(f"{number} {path.name}")
        except OctavoError as exc:
            if exc.exit_code != 3 or str(store) not in str(exc):
                silent.append(f"{number} {path.name}: {exc}")
        path.write_bytes(files[path])
    return silent


def test_no_mutation_is_silent(fast_path: Path) -> None:
    assert not survivors(make_store(fast_path / "c", 1), 2400)


def test_control_without_digests_mutations_are_silent(fast_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "matches", lambda *_: True)
    assert len(survivors(make_store(fast_path / "c", 1), 200)) > 5


def test_a_file_truncated_while_open_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path, 1)
    calls = Capture.open(store).calls()
    next(calls)
    path = unit_of(store) / "data-000.safetensors"
    path.chmod(0o600)
    os.truncate(path, 1024)
    refused(lambda: list(calls), 3, "damaged (truncated)")


KINDS: dict[str, Callable[[Path], None]] = {
    "is a symbolic link": lambda path: path.symlink_to("/etc/passwd"),
    "not a regular file": os.mkfifo,
    "not a regular file.": Path.mkdir,
}


@pytest.mark.parametrize("name", ["unit.json", "data-000.safetensors", "capture.json", "complete.json"])
@pytest.mark.parametrize("fact", KINDS)
def test_links_fifos_and_directories_are_refused(tmp_path: Path, name: str, fact: str) -> None:
    store = make_store(tmp_path, 1)
    path = next(store.rglob(name))
    path.unlink()
    KINDS[fact](path)
    assert f"/{name}: {fact}" in refused_read(store)


@pytest.mark.parametrize("name", ["unit.json", "capture.json", "complete.json"])
def test_a_huge_manifest_is_not_read(tmp_path: Path, name: str) -> None:
    store = make_store(tmp_path, 1)
    os.truncate(next(store.rglob(name)), 1 << 30)
    assert f"/{name}: larger than 64 MiB" in refused_read(store)


def test_units_of_another_capture_are_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "mine", 2)
    other = make_store(tmp_path / "other", 3)
    shutil.copytree(unit_of(other, 2), store / "units" / unit_of(other, 2).name)
    name = unit_of(other, 2).name
    assert refused_read(store).startswith(f"/units/{name}: not listed in complete.json. Delete ")
    shutil.rmtree(store / "units" / name)

    # the same prompt with other calls
    with (
        CaptureWriter.create(tmp_path / "third", MANIFEST) as writer,
        writer.unit(0, {"prompt": "prompt 0", "seed": 0}) as unit,
    ):
        unit.add(calls_of(7)[0])
    shutil.rmtree(unit_of(store))
    shutil.copytree(unit_of(tmp_path / "third"), store / "units" / unit_of(tmp_path / "third").name)
    assert "not the unit that complete.json lists (checksum)" in refused_read(store)


def test_a_unit_under_another_name_is_refused(tmp_path: Path) -> None:
    with CaptureWriter.create(tmp_path, PLANNED) as writer:
        fill(writer, [0])
    unit = unit_of(tmp_path)
    unit.rename(unit.with_name(unit.name.replace("000000", "000005")))
    assert "its directory name does not match its content" in refused_read(tmp_path, allow_incomplete=True)
    (tmp_path / "units" / "notes").mkdir()
    assert "/units/notes: not a unit of a capture" in refused_read(tmp_path, allow_incomplete=True)
