"""Checks that files of torch.save load if they hold only data, and that any other file is refused by what it holds."""

import errno
import functools
import importlib
import io
import os
import pickle
import shutil
import stat
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from octavo.capture.errors import OctavoError
from octavo.capture.listener import Listener
from octavo.capture.pth.pickles import LEGACY_MAGIC, NOT_LOADED
from octavo.capture.pth.pth import convert_pth, load_samples, safe_torch_load, save_pth
from octavo.capture.store.reader import Call, Capture

from ...helpers.faults import counting, failing
from ...helpers.refusals import refused
from ...helpers.stores import calls_of, same

FORMATS = {"zip": True, "legacy": False}
SAMPLE: dict[str, Any] = {
    "hidden_states": torch.arange(6.0).half().reshape(2, 3),
    "timestep": torch.tensor([7.0]),
    "expanded": torch.ones(3).expand(4, 3),
    "empty": torch.empty(0, 3),
    "bf16": torch.ones(2).bfloat16(),
    "nested": {"list": [torch.ones(1), (1, 2.5, None, True)], "dtype": torch.float16, "size": torch.Size([1, 2])},
    "bytes": b"ab",
    "text": "текст",
    "large": 2**80,
}


def refused_load(path: Path, load: Callable[[Path], Any] = safe_torch_load) -> str:
    """Checks that `load` refuses the file, and returns the message without the path in front. Standard input is closed
    meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", None)
        return refused(lambda: load(path), 3).removeprefix(str(path))


@pytest.mark.parametrize("form", FORMATS)
def test_samples_load_from_files_and_links(tmp_path: Path, form: str) -> None:
    torch.save([SAMPLE, SAMPLE], tmp_path / "f.pth", _use_new_zipfile_serialization=FORMATS[form])
    assert same(safe_torch_load(tmp_path / "f.pth"), [SAMPLE, SAMPLE])
    (tmp_path / "link.pth").symlink_to("f.pth")
    assert same(load_samples(tmp_path / "link.pth"), [((), SAMPLE)] * 2)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_every_pickle_protocol_that_holds_tensors_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, protocol: int
) -> None:
    ordered = OrderedDict(a=torch.ones(2), b=None)
    vars(ordered)["_metadata"] = {"version": 1}
    sample = SAMPLE | {"ordered": ordered, "set": {1, 2}, "parameter": torch.nn.Parameter(torch.ones(2))}
    path = tmp_path / "f.pth"
    torch.save([sample], path, _use_new_zipfile_serialization=FORMATS[form], pickle_protocol=protocol)
    (read,) = safe_torch_load(path)
    assert same(read, sample)
    assert vars(read["ordered"]) == vars(ordered)
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    assert refused_load(path).startswith(f": has pickle protocol {protocol}, which TORCH_FORCE_WEIGHTS_ONLY_LOAD")


@pytest.mark.parametrize("form", FORMATS)
def test_a_protocol_without_tensors_is_named(tmp_path: Path, form: str) -> None:
    whole = [{"x": torch.ones(2)}]
    torch.save(whole, tmp_path / "f.pth", _use_new_zipfile_serialization=FORMATS[form], pickle_protocol=1)
    assert same(safe_torch_load(tmp_path / "f.pth"), whole)
    torch.save(whole, tmp_path / "f.pth", _use_new_zipfile_serialization=FORMATS[form], pickle_protocol=0)
    assert refused_load(tmp_path / "f.pth").startswith(": has pickle protocol 0, ")


def test_parameters_and_rarer_dtypes_load(tmp_path: Path) -> None:
    values = [torch.nn.Parameter(torch.ones(2)), torch.ones(2).to(torch.float8_e4m3fn), torch.tensor([1 + 2j])]
    values += [torch.tensor([3], dtype=torch.uint16), torch.tensor(True), torch.ones(3, dtype=torch.int8)]
    torch.save(values, tmp_path / "f.pth")
    assert all(one.equal(other) for one, other in zip(safe_torch_load(tmp_path / "f.pth"), values, strict=True))


class Runs:
    """An object whose pickle calls `function` with `args` when it is loaded."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


MARK = "open('marker', 'w')"
QINT8 = torch.qint8
EVIL: dict[str, tuple[Callable[[], Any], str]] = {
    "os.system": (lambda: Runs(os.system, "touch marker"), "posix.system"),
    "exec": (lambda: Runs(exec, MARK), "builtins.exec"),
    "eval": (lambda: Runs(eval, MARK), "builtins.eval"),
    "import_module": (lambda: Runs(importlib.import_module, "antigravity"), "importlib.import_module"),
    "partial": (lambda: Runs(functools.partial, os.system, "touch marker"), "functools.partial"),
    "hub.load": (lambda: Runs(torch.hub.load, "a/b", "c"), "torch.hub.load"),
    "jit.load": (lambda: Runs(torch.jit.load, "marker"), "torch.jit._serialization.load"),
    "module": (lambda: torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
    "allowed by torch alone": (lambda: Runs(bytearray, 1 << 40), "builtins.bytearray"),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "torch._utils._rebuild_qtensor",
    ),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", EVIL)
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_code_is_named_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, form: str, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    make, needs = EVIL[name]
    path = tmp_path / "f.pth"
    torch.save([{"x": make()}], path, _use_new_zipfile_serialization=FORMATS[form], pickle_protocol=protocol)
    assert refused_load(path) == f": needs {needs}, which is not allowed in a data file. {NOT_LOADED}"
    assert not (tmp_path / "marker").exists()


def test_control_torch_load_would_run_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save([EVIL["os.system"][0]()], tmp_path / "f.pth")
    torch.load(tmp_path / "f.pth", weights_only=False)
    assert (tmp_path / "marker").exists()


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def zipped(entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return buffer.getvalue()


SCRIPT = {f"m/{name}": b"" for name in ("data.pkl", "code/__torch__/torch/nn.py", "constants.pkl", "version")}
WHOLE = saved([SAMPLE])
LEGACY = saved([SAMPLE], _use_new_zipfile_serialization=False)
FOREIGN: dict[str, tuple[Callable[[], bytes], str]] = {
    "truncated": (lambda: WHOLE[:-100], "a truncated or damaged one"),
    "half": (lambda: WHOLE[: len(WHOLE) // 2], "a truncated or damaged one"),
    "legacy truncated": (lambda: LEGACY[:-20], "a plain or damaged pickle"),
    "legacy half": (lambda: LEGACY[: len(LEGACY) // 2], "a plain or damaged pickle"),
    "empty": (lambda: b"", "an empty file"),
    "text": (lambda: b"epoch,loss\n1,0.5\n", "text"),
    "random": (lambda: bytes(range(255, 0, -1)) * 4, "unknown data"),
    "TorchScript": (lambda: zipped(SCRIPT), "a TorchScript program"),
    "safetensors": (lambda: b"\x02\0\0\0\0\0\0\0{}", "safetensors"),
    "raw pickle": (lambda: pickle.dumps({"a": 1}), "a plain pickle"),
    "zip": (lambda: zipped({"a.txt": b"x"}), "some other zip archive"),
    "numpy": (lambda: b"\x93NUMPY\x01\0" + bytes(range(120)), "unknown data"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FOREIGN)
def test_other_files_are_called_what_they_look_like(tmp_path: Path, name: str) -> None:
    make, what = FOREIGN[name]
    (tmp_path / "f.pth").write_bytes(make())
    assert refused_load(tmp_path / "f.pth") == f": not a file of torch.save (looks like {what}). {NOT_LOADED}"


def test_missing_and_special_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert refused_load(tmp_path / "none") == ": missing."
    assert refused_load(tmp_path / "fifo") == ": not a regular file."
    assert refused_load(tmp_path) == ": not a regular file."


def test_claims_of_memory_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "f.pth"
    for form in FORMATS.values():
        torch.save([torch.zeros(1).expand(10**12)], path, _use_new_zipfile_serialization=form)
        assert refused_load(path).startswith(": tensor of 3.6 TiB in a ")

    # a storage that claims more bytes than the file has
    with zipfile.ZipFile(io.BytesIO(saved([torch.zeros(5)]))) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in entries if name.endswith("data.pkl"))
    entries[name] = entries[name].replace(b"K\x05tq", b"\x8a\x05\0\0\0\0\x01tq", 1)
    path.write_bytes(zipped(entries))
    assert "tensor of 16.0 GiB in a " in refused_load(path)


def test_a_deflate_bomb_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(saved([torch.zeros(1 << 20)]))) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    path = tmp_path / "f.pth"
    path.write_bytes(zipped(entries, zipfile.ZIP_DEFLATED))
    assert path.stat().st_size < 1 << 14
    assert refused_load(path).startswith(": tensor of 4.0 MiB in a ")


@pytest.mark.parametrize(
    ("value", "fact"),
    [
        (torch.ones(2), "expected a list of samples, found Tensor"),
        (3, "expected a list of samples, found int"),
        ([SAMPLE, 3], "sample 1 is a int, not a dict with names as keys, a list or a tuple"),
        ([{1: torch.ones(1)}], "sample 0 is a dict, not a dict with names as keys, a list or a tuple"),
    ],
)
def test_anything_but_a_list_of_samples_is_refused(tmp_path: Path, value: Any, fact: str) -> None:
    torch.save(value, tmp_path / "f.pth")
    assert refused_load(tmp_path / "f.pth", load_samples).startswith(f": {fact}. Save ")


def test_one_sample_and_positional_samples_load(tmp_path: Path) -> None:
    torch.save(SAMPLE, tmp_path / "one.pth")
    assert same(load_samples(tmp_path / "one.pth"), [((), SAMPLE)])
    torch.save([[torch.ones(1), None], (torch.ones(2),)], tmp_path / "two.pth")
    assert same(load_samples(tmp_path / "two.pth"), [((torch.ones(1), None), {}), ((torch.ones(2),), {})])


def proto4(opcodes: bytes) -> bytes:
    """Returns a pickle of protocol 5 that consists of these opcodes."""
    return pickle.PROTO + b"\x05" + opcodes + pickle.STOP


def text(word: bytes) -> bytes:
    """Returns the opcode that pushes a short text."""
    return pickle.SHORT_BINUNICODE + bytes([len(word)]) + word


def name(module: bytes, word: bytes) -> bytes:
    """Returns the opcodes that push the object `word` of a module, as protocol 4 writes them."""
    return text(module) + text(word) + pickle.STACK_GLOBAL + pickle.MEMOIZE


HUGE = (1 << 62).to_bytes(8, "little")
REBUILD = name(b"torch._utils", b"_rebuild_tensor_v2")
CRAFTED = {  # name: (opcodes of a pickle, words of the refusal)
    "call by protocol 4": (name(b"posix", b"system") + text(b"touch marker") + b"\x85R", "needs posix.system"),
    "dotted name": (name(b"collections", b"OrderedDict.__init__") + b")R", "needs collections.OrderedDict."),
    "dotted allowed name": (name(b"torch", b"_utils._rebuild_tensor_v2") + b")R", "not a file"),
    "import of a submodule": (name(b"torch.hub", b"load") + b")R", "needs torch.hub.load"),
    "bytearray": (pickle.BYTEARRAY8 + HUGE, "needs builtins.bytearray"),
    "buffer": (pickle.NEXT_BUFFER, "needs buffers outside"),
    "read-only buffer": (b"N" + pickle.READONLY_BUFFER, "needs buffers outside"),
    "huge frame": (pickle.FRAME + HUGE + b"N", "not a file"),
    "huge text": (pickle.BINUNICODE8 + HUGE, "not a file"),
    "huge bytes": (pickle.BINBYTES8 + HUGE, "not a file"),
    "state of a function": (
        REBUILD + b"N}" + text(b"__defaults__") + b")s\x86b",
        "needs to set attributes of an object of class ",
    ),
    "attributes of a function": (
        REBUILD + b"}" + text(b"marker") + b"Nsb",
        "needs to set attributes of an object of class ",
    ),
    "state of a set": (pickle.EMPTY_SET + b"}b", "needs to set attributes of an object of class set"),
    "extension": (b"\x82\x01", "needs copyreg extension 1"),
    "memo of nothing": (b"h\x07", "not a file"),
    "instance": (b"(iposix\nsystem\n", "needs posix.system"),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("case", CRAFTED)
def test_crafted_pickles_of_new_protocols_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, form: str
) -> None:
    monkeypatch.chdir(tmp_path)
    opcodes, words = CRAFTED[case]
    head = b"".join(pickle.dumps(value, 2) for value in (LEGACY_MAGIC, 1001, {}))
    whole = zipped({"a/data.pkl": proto4(opcodes), "a/version": b"3\n"}) if FORMATS[form] else head + proto4(opcodes)
    (tmp_path / "f.pth").write_bytes(whole)
    before = torch._utils._rebuild_tensor_v2.__defaults__, dict(vars(torch._utils._rebuild_tensor_v2))
    assert words in refused_load(tmp_path / "f.pth")
    assert before == (torch._utils._rebuild_tensor_v2.__defaults__, vars(torch._utils._rebuild_tensor_v2))
    assert [path.name for path in tmp_path.iterdir()] == ["f.pth"]


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("form", FORMATS)
def test_mutations_load_equal_or_are_refused(tmp_path: Path, form: str, protocol: int) -> None:
    path = tmp_path / "f.pth"
    value = [{"x": torch.ones(2), "n": {1}, "b": b"x"}]
    for whole in (saved(value, _use_new_zipfile_serialization=FORMATS[form], pickle_protocol=protocol),):
        for position in range(protocol, len(whole), 13):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x15]) + whole[position + 1 :])
            try:
                safe_torch_load(path)
            except OctavoError as exc:
                code = exc.exit_code
            else:
                code = 3
            assert code == 3


def test_save_pth_writes_the_documented_list(tmp_path: Path) -> None:
    path = tmp_path / "f.pth"
    for _ in range(2):
        save_pth(path, calls_of(0))
    assert stat.S_IMODE(path.stat().st_mode) == 0o400
    assert same(torch.load(path, weights_only=True), [call.kwargs for call in calls_of(0)])
    save_pth(path, [calls_of(0)[0]._replace(args=(torch.ones(1),), kwargs={})])
    assert same(torch.load(path, weights_only=True), [(torch.ones(1),)])
    refused(lambda: save_pth(path, [calls_of(0)[0]._replace(args=(1,))]), 4, "both positional and keyword arguments")


def test_save_pth_on_a_full_disk_is_a_storage_error(tmp_path: Path) -> None:
    with counting() as calls:
        save_pth(tmp_path / "f.pth", calls_of(0))
    last = len(calls.names) - 1 - calls.names[::-1].index("write")
    for index in (calls.names.index("write"), last):
        with counting(index, failing(errno.ENOSPC)):
            refused(lambda: save_pth(tmp_path / "g.pth", calls_of(0)), 5, "no space left")
        assert [path.name for path in tmp_path.iterdir()] == ["f.pth"]


def test_a_disk_with_too_little_space_is_noticed_before_anything_is_written(tmp_path: Path, monkeypatch: Any) -> None:
    torch.save([{"x": torch.ones(1000)}], tmp_path / "f.pth")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=3999))
    refused(lambda: convert_pth(tmp_path / "f.pth", tmp_path / "capture"), 5, f"{tmp_path / 'capture'}: no space left")
    calls = [Call("transformer", 0, 0, None, None, (), {"x": torch.ones(1000)})]
    refused(lambda: save_pth(tmp_path / "g.pth", calls), 5, f"{tmp_path / 'g.pth'}: needs about 3.9 KiB")
    refused(lambda: record_a_call(tmp_path / "listened"), 5, f"{tmp_path / 'listened'}: no space left")
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".safetensors" or path.name == "g.pth"]
    monkeypatch.undo()
    convert_pth(tmp_path / "f.pth", tmp_path / "capture")
    record_a_call(tmp_path / "listened")


def record_a_call(directory: Path) -> None:
    """Records one call of a linear layer, whose input has 4000 bytes."""
    module = torch.nn.Linear(1000, 1)
    with Listener(module, directory):
        module(torch.ones(1, 1000))


def test_convert_pth_makes_a_capture(tmp_path: Path) -> None:
    torch.save([SAMPLE, (torch.ones(2), 3)], tmp_path / "f.pth")
    convert_pth(tmp_path / "f.pth", tmp_path / "capture")
    first, second = Capture.open(tmp_path / "capture").calls()
    assert (first.component, first.index, first.timestep) == ("transformer", 0, 7.0)
    assert same(first.kwargs, SAMPLE)
    assert same(second.args, (torch.ones(2), 3))


def test_convert_pth_takes_the_containers_of_the_library_and_names_the_sample_of_another(tmp_path: Path) -> None:
    path = tmp_path / "f.pth"
    ordered = OrderedDict(scale=torch.ones(1), flag=True)
    torch.save([[torch.ones(1, 4).half(), None, ordered]], path)
    convert_pth(path, tmp_path / "capture")
    capture = Capture.open(tmp_path / "capture")
    (call,) = capture.calls()
    assert same(call.args, (torch.ones(1, 4).half(), None, dict(ordered)))
    assert capture.manifest["dtype"] == "float16"
    torch.save([SAMPLE, {"x": {1, 2}}], path, pickle_protocol=4)
    message = refused(lambda: convert_pth(path, tmp_path / "other"), 3, "sample 1: 'x': cannot store")
    assert message.startswith(f"{path}: ")
    assert "--" not in message
    assert "--" not in refused(lambda: convert_pth(path, tmp_path / "capture"), 5, "holds a capture")
