"""Checks the store as a state machine: in any order of events, a read returns the sealed units or names the damage."""

import os
import re
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from octavo.capture.errors import OctavoError
from octavo.capture.store import reader
from octavo.capture.store import writer as store
from octavo.capture.store.layout import read_sealed
from octavo.capture.store.reader import Call, Capture
from octavo.capture.store.writer import CaptureWriter, unit_key

from ...helpers.examples import examples
from ...helpers.faults import counting, dying, in_child
from ...helpers.refusals import refused
from ...helpers.stores import MANIFEST, calls_of, fill, holds, info_of, same

UNITS = 3
NAMES = {index: f"{index:06d}-{unit_key(info_of(index))}" for index in range(UNITS)}
CALLS = {index: calls_of(index) for index in range(UNITS)}
INDICES = st.sampled_from(range(UNITS))
MEMORY = Path("/dev/shm")


class Abandoned(Exception):
    """Raised inside a unit to end it before it is complete."""


class Store(RuleBasedStateMachine):
    """A store and its expected content.

    `sealed` has the indices of the sealed units, `listed` the indices in complete.json, or None if that file does not
    exist. `flips` has the bits that differ from the bits written. `open_capture` is an earlier result of
    `Capture.open`, with the units sealed at that time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.memory = TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None)
        self.directory = Path(self.memory.name) / "capture"
        self.complete_json = self.directory / "complete.json"
        self.sealed: set[int] = set()
        self.listed: set[int] | None = None
        self.flips: set[tuple[Path, int, int]] = set()
        self.writer: CaptureWriter | None = None
        self.writing: tuple[int, ExitStack] | None = None
        self.open_capture: tuple[Capture, set[int]] | None = None

    def unit(self, index: int) -> Path:
        return self.directory / "units" / NAMES[index]

    def damaged(self, path: Path) -> bool:
        """Returns whether this file, or a file below this directory, has a flipped bit."""
        return any(flipped.is_relative_to(path) for flipped, _, _ in self.flips)

    def unreadable(self) -> bool:
        """Returns whether a unit.json is damaged. A writing session reads unit.json, but not the data."""
        return any(path.name == "unit.json" for path, _, _ in self.flips)

    def changed(self, path: Path) -> None:
        """Forgets the flipped bits of a file or directory that was removed or rewritten."""
        self.flips = {flip for flip in self.flips if not flip[0].is_relative_to(path)}

    def session(self) -> CaptureWriter:
        return CaptureWriter.create(self.directory, MANIFEST | {"prompts": UNITS}, resume=True)

    # Writing

    @precondition(lambda self: self.writer is None)
    @rule()
    def resume(self) -> None:
        """Starts a session: it finds every sealed unit and removes abandoned staging directories, or names a damaged
        unit.json."""
        if self.unreadable():
            refused(self.session, 3, "damaged")
            return
        self.writer = self.session()
        assert set(self.writer.stored) == self.sealed
        assert [path.name for path in self.directory.rglob(".*")] == [".lock"]

    @precondition(lambda self: self.writer is not None)
    @rule()
    def resume_while_it_is_written(self) -> None:
        refused(self.session, 5, f"in use by pid {os.getpid()} ")

    @precondition(lambda self: self.writer is not None and self.writing is None)
    @rule(index=INDICES)
    def begin(self, index: int) -> None:
        """Begins a unit with its first call. The writer removes complete.json before a unit is added that it does not
        list."""
        block = ExitStack()
        if index in self.writer.stored:
            refused(lambda: block.enter_context(self.writer.unit(index, info_of(index))), 4, "already stored")
            return
        unit = block.enter_context(self.writer.unit(index, info_of(index)))
        self.listed = None
        self.changed(self.complete_json)
        unit.add(CALLS[index][0])
        self.writing = (index, block)
        block.callback(lambda: [unit.add(call) for call in CALLS[index][1:]])

    @precondition(lambda self: self.writing is not None)
    @rule()
    def commit(self) -> None:
        index, block = self.writing
        block.close()
        self.writing = None
        self.sealed.add(index)

    @precondition(lambda self: self.writing is not None)
    @rule()
    def drop(self) -> None:
        _, block = self.writing
        self.writing = None
        with pytest.raises(Abandoned), block:
            raise Abandoned

    @precondition(lambda self: self.writer is not None and self.writing is None)
    @rule()
    def complete(self) -> None:
        """Writes complete.json, which is refused if a unit.json cannot be read."""
        if self.unreadable():
            refused(self.writer.complete, 3, "damaged")
            return
        self.writer.complete()
        self.listed = set(self.sealed)
        self.changed(self.complete_json)

    @precondition(lambda self: self.writer is not None and self.writing is None)
    @rule()
    def close(self) -> None:
        self.writer.close()
        self.writer = None

    # Deaths and damage

    @precondition(lambda self: self.writer is None)
    @rule(indices=st.lists(INDICES, max_size=2, unique=True), position=st.integers(0, 70))
    def die(self, indices: list[int], position: int) -> None:
        """Runs a session in another process, which dies at call number `position` of os, or ends normally."""
        report = Path(self.memory.name) / "told"
        report.write_bytes(b"")
        before = self.complete_json.read_bytes() if self.complete_json.exists() else None

        def work() -> None:
            with counting(position, dying), self.session() as writer:
                for index in indices:
                    fill(writer, [index])
                    report.write_bytes(report.read_bytes() + bytes([index]))
                writer.complete()

        def session() -> None:
            try:
                work()
            except OctavoError as exc:
                if exc.exit_code != 3 or not self.unreadable():
                    raise

        assert in_child(session) in (0, 9)
        self.see(set(indices), set(report.read_bytes()), before)

    @precondition(lambda self: self.writer is None)
    @rule(index=INDICES)
    def abandon(self, index: int) -> None:
        """Runs a process that dies in the middle of a unit and leaves the staging directory."""
        if index in self.sealed or self.damaged(self.directory / "units"):
            return
        before = self.complete_json.read_bytes() if self.complete_json.exists() else None

        def session() -> None:
            with self.session() as writer, writer.unit(index, info_of(index)) as unit:
                unit.add(CALLS[index][0])
                dying()

        assert in_child(session) == 9
        assert list((self.directory / "units").glob(".staging-*"))
        self.see(set(), set(), before)

    def see(self, allowed: set[int], reports: set[int], before: bytes | None) -> None:
        """Checks what a process left: every sealed or reported unit, and no unit that is not `allowed`."""
        there = {index for index in NAMES if self.unit(index).exists()}
        assert self.sealed | reports <= there <= self.sealed | allowed
        self.sealed = there
        now = self.complete_json.read_bytes() if self.complete_json.exists() else None
        if now != before:
            self.changed(self.complete_json)
            names = None if now is None else set(read_sealed(self.complete_json).body["units"])
            assert names is None or names == {NAMES[index] for index in there}
            self.listed = None if names is None else set(there)

    @rule(data=st.data(), bit=st.integers(0, 7))
    def corrupt(self, data: st.DataObject, bit: int) -> None:
        """Flips one bit of a file of a unit, or of complete.json. A second flip of the same bit restores the file."""
        files = [path for index in sorted(self.sealed) for path in sorted(self.unit(index).iterdir())]
        files += [self.complete_json] * (self.listed is not None)
        if not files:
            return
        path = data.draw(st.sampled_from(files))
        content = bytearray(path.read_bytes())
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] ^= 1 << bit
        path.chmod(0o600)
        path.write_bytes(content)
        self.flips ^= {(path, position, bit)}

    @precondition(lambda self: self.writer is None and (self.flips or self.listed not in (None, self.sealed)))
    @rule()
    def follow_the_remedy(self) -> None:
        """Follows the advice of a message: deletes the file, which must be damaged, or runs a session that writes
        missing units again."""
        message = self.message(lambda: Capture.open(self.directory, allow_incomplete=True).verify())
        assert message, self.flips
        if message.endswith("missing. Run capture --resume."):
            message = self.message(self.whole_session)
        if not message:
            self.sealed, self.listed = set(NAMES), set(NAMES)
            self.changed(self.complete_json)
            return
        match = re.search(r"Delete (.+) and run capture --resume\.$", message)
        assert match is not None, message
        path = Path(match[1])
        assert self.damaged(path)
        if path == self.complete_json:
            path.unlink()
            self.listed = None
        else:
            shutil.rmtree(path)
            self.sealed.remove(next(index for index in self.sealed if self.unit(index) == path))
        self.changed(path)

    def whole_session(self) -> None:
        with self.session() as writer:
            fill(writer, range(UNITS))
            writer.complete()

    @staticmethod
    def message(work: Callable[[], None]) -> str:
        """Returns the message of the refusal of `work`, or "" if it ends normally."""
        try:
            work()
        except OctavoError as exc:
            return str(exc)
        return ""

    # Reading

    @precondition(lambda self: self.open_capture is None or len(self.open_capture[1]) < len(self.sealed))
    @rule()
    def hold(self) -> None:
        """Opens a capture that is read again after each of the following steps."""
        try:
            self.open_capture = (Capture.open(self.directory, allow_incomplete=True), set(self.sealed))
        except OctavoError:
            self.open_capture = None

    @invariant()
    def a_read_gives_what_was_sealed_or_names_the_damage(self) -> None:
        for allowed in (True, False):
            calls, code = self.read(lambda allowed=allowed: Capture.open(self.directory, allow_incomplete=allowed))
            expected = self.expected(allowed)
            assert code == expected
            if expected == 0:
                assert self.are(calls, self.sealed)

    def expected(self, allow_incomplete: bool) -> int:
        """Returns the exit code that a read should have; 0 means that it returns all calls."""
        if not (self.directory / "capture.json").exists() or not (self.directory / "units").exists():
            return 3
        if self.listed is None and not allow_incomplete:
            return 4
        if self.flips or (self.listed is not None and self.listed != self.sealed):
            return 3
        return 0 if self.sealed else 4

    @invariant()
    def what_was_opened_before_reads_the_same_or_names_the_damage(self) -> None:
        if self.open_capture is None:
            return
        capture, units = self.open_capture
        sound = units <= self.sealed and not any(self.damaged(self.unit(index)) for index in units)
        calls, code = self.read(lambda: capture)
        assert code == (0 if sound else 3)
        assert not sound or self.are(calls, units)

    @staticmethod
    def read(opened: Callable[[], Capture]) -> tuple[list[Call], int]:
        """Reads a capture and returns its calls and 0, or no calls and the exit code. Errors other than OctavoError are
        not caught."""
        try:
            capture = opened()
            capture.verify()
            return list(capture.calls()), 0
        except OctavoError as exc:
            return [], exc.exit_code if "\n" not in str(exc) else -1

    @staticmethod
    def are(calls: list[Call], units: set[int]) -> bool:
        expected = [call for index in sorted(units) for call in CALLS[index]]
        return len(calls) == len(expected) and all(map(same, calls, expected))

    def teardown(self) -> None:
        """Checks that following the messages and running one more session leads to the whole capture."""
        try:
            if self.writing is not None:
                self.drop()
            if self.writer is not None:
                self.close()
            while self.flips:
                self.follow_the_remedy()
            self.whole_session()
            assert holds(self.directory, UNITS)
            assert not list(self.directory.rglob(".*"))
        finally:
            if self.writer is not None:
                self.writer.close()
            self.memory.cleanup()


STEPS = settings(
    examples(60, few=12), stateful_step_count=25, suppress_health_check=list(HealthCheck), print_blob=False
)


def test_every_read_gives_what_was_sealed_or_names_the_damage() -> None:
    run_state_machine_as_test(Store, settings=STEPS)


BROKEN: dict[str, tuple[object, str, Callable[..., object]]] = {
    "no digests of the data": (reader, "matches", lambda *_: True),
    "complete.json stays": (store, "remove", lambda path: None),
    "staging is not tidied": (store, "clean", lambda path: None),
}


@pytest.mark.slow  # Hypothesis draws enough examples for one to show the missing protection
@pytest.mark.parametrize("protection", BROKEN)
def test_control_a_removed_protection_is_noticed(protection: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*BROKEN[protection])
    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            Store,
            settings=settings(
                STEPS, max_examples=400, phases=[Phase.generate], report_multiple_bugs=False, database=None
            ),
        )
