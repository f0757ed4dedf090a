"""Writing a capture: where it may be written, what it holds, and what is left when anything goes wrong."""

import errno
import gc
import os
import resource
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch

from capture import unit as unit_module
from capture.blobs import Stats
from capture.errors import CaptureError
from capture.reader import Capture
from capture.sealed import read_sealed
from capture.store import Call, CaptureWriter, unit_key
from tests.faults import counting, dying, failing, in_child
from tests.stores import MANIFEST, calls_of, files_of, fill, holds, info_of, make_store, same

PLANNED = MANIFEST | {"prompts": 50}


def refused(directory: Path, exit_code: int, manifest: dict[str, Any] = PLANNED, **options: Any) -> str:
    """What CaptureWriter.create says, without the directory in front."""
    with pytest.raises(CaptureError) as caught:
        CaptureWriter.create(directory, manifest, **options)
    assert caught.value.exit_code == exit_code
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{directory}")


def call(**kwargs: Any) -> Call:
    return Call("transformer", 0, 0, 1.0, None, (), kwargs)


def stored_and_read(directory: Path, *calls: Call) -> list[Call]:
    with CaptureWriter.create(directory, MANIFEST) as writer:
        with writer.unit(0, {}) as unit:
            for one in calls:
                unit.add(one)
        writer.complete()
    return list(Capture.open(directory).calls())


# The output directory


def test_d1_absent_directory_is_made_with_its_parents(tmp_path: Path) -> None:
    make_store(tmp_path / "a" / "b")
    assert holds(tmp_path / "a" / "b")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o700


def test_d2_empty_directory_is_used(tmp_path: Path) -> None:
    assert holds(make_store(tmp_path))


def test_d3_a_capture_that_is_there(tmp_path: Path) -> None:
    with CaptureWriter.create(tmp_path, PLANNED) as writer:
        fill(writer, range(2))
    before = {path: path.read_bytes() for path in files_of(tmp_path)}
    expected = ": holds a capture (2 of 50 prompts). Use --resume or another directory."
    assert refused(tmp_path, 5) == expected
    assert {path: path.read_bytes() for path in files_of(tmp_path)} == before


def test_d4_foreign_files(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("theirs")
    for resume in (False, True):
        assert refused(tmp_path, 5, resume=resume) == ": not empty and not a capture (found x)."
    assert os.listdir(tmp_path) == ["x"]


def test_d5_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    assert refused(tmp_path / "f", 5) == ": exists and is not a directory."


def test_d6_symbolic_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with CaptureWriter.create(tmp_path / "link", MANIFEST) as writer:
        assert writer.directory == (tmp_path / "real").resolve()
        fill(writer, range(3))
        writer.complete()
    unit = next((tmp_path / "real" / "units").iterdir())
    unit.rename(tmp_path / "elsewhere")
    unit.symlink_to(tmp_path / "elsewhere")
    message = f"/units/{unit.name}: symbolic link inside the capture. "
    assert refused(tmp_path / "real", 3, MANIFEST, resume=True).startswith(message)
    with pytest.raises(CaptureError, match="symbolic link inside the capture"):
        Capture.open(tmp_path / "real")


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory other users can reach, as those of pytest are not."""
    path = Path(mkdtemp())
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become another user")
@pytest.mark.parametrize("exists", [True, False])
def test_d7_not_writable(open_directory: Path, exists: bool) -> None:
    target = open_directory if exists else open_directory / "capture"

    def as_another_user() -> None:
        os.setuid(1000)
        assert refused(target, 5) == ": permission denied for uid 1000."

    assert in_child(as_another_user) == 0
    assert os.listdir(open_directory) == []


def test_d8_read_only(tmp_path: Path) -> None:
    target = tmp_path / "capture"
    with counting(0, failing(errno.EROFS)):
        assert refused(target, 5) == ": read-only file system."


def test_d9_full_disk_tells_what_is_stored_and_resumes(tmp_path: Path) -> None:
    with CaptureWriter.create(tmp_path, PLANNED) as writer:
        fill(writer, range(4))
        with counting() as calls, writer.unit(4, info_of(4)) as unit:
            for one in calls_of(4):
                unit.add(one)
        at = calls.made.index("write")
    shutil.rmtree(tmp_path / "units" / f"000004-{unit_key(info_of(4))}")
    for number in (errno.ENOSPC, errno.EDQUOT):
        with CaptureWriter.create(tmp_path, PLANNED, resume=True) as writer:
            with pytest.raises(CaptureError) as caught, counting(at, failing(number)):
                fill(writer, [4])
            assert str(caught.value) == (
                f"{tmp_path}: no space left (needs about 1 MiB more). 4 of 50 prompts are stored; "
                "free space and run again with --resume."
            )
            assert caught.value.exit_code == 5
    with CaptureWriter.create(tmp_path, MANIFEST | {"prompts": 5}, resume=True) as writer:
        fill(writer, range(5))
        writer.complete()
    assert holds(tmp_path, 5)


def test_d9_a_real_limit_on_file_size(tmp_path: Path) -> None:
    def limited() -> None:
        with CaptureWriter.create(tmp_path, MANIFEST) as writer:
            fill(writer, range(2))
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
            with pytest.raises(CaptureError, match="file too large for this file system or limit") as caught:
                fill(writer, [2])
            assert caught.value.exit_code == 5

    assert in_child(limited) == 0
    with CaptureWriter.create(tmp_path, MANIFEST, resume=True) as writer:
        assert sorted(writer.stored) == [0, 1]
        fill(writer, range(3))
        writer.complete()
    assert holds(tmp_path)


def test_d10_in_use(tmp_path: Path) -> None:
    with CaptureWriter.create(tmp_path, MANIFEST):
        expected = f": in use by pid {os.getpid()} on host {os.uname().nodename}."
        assert refused(tmp_path, 5, MANIFEST, resume=True) == expected


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_d11_file_system_without_sync(tmp_path: Path, number: int) -> None:
    with counting() as calls, CaptureWriter.create(tmp_path / "probe", MANIFEST):
        pass
    with counting(calls.made.index("fsync"), failing(number)):
        assert "the file system lacks rename, lock or sync" in refused(tmp_path / "capture", 5)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o377])
@pytest.mark.parametrize("group", [False, True])
def test_d12_modes(tmp_path: Path, umask: int, group: bool) -> None:
    before = os.umask(umask)
    try:
        store = make_store(tmp_path / "capture", 1, group_readable=group)
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    directory, manifest, data = (0o750, 0o640, 0o440) if group else (0o700, 0o600, 0o400)
    for path in [store, *store.rglob("*")]:
        expected = directory if path.is_dir() else data if path.suffix == ".safetensors" else manifest
        assert stat.S_IMODE(path.stat().st_mode) == expected


@pytest.mark.parametrize("name", ["with space", "a+b", "采集", "x" * 255, "new\nline", "-dash", "'quote'"])
def test_d13_unusual_names(tmp_path: Path, name: str) -> None:
    assert holds(make_store(tmp_path / name))


def test_d14_names_too_long(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["d" * 200] * 20, "e" * (4080 - 20 * 201 - len(str(tmp_path))))
    for path in (tmp_path / ("x" * 256), tmp_path.joinpath(*["d" * 200] * 25), deep):
        assert refused(path, 5) == ": name too long."
    assert os.listdir(tmp_path) == []


# What is stored


def test_the_layout_is_the_documented_one(tmp_path: Path) -> None:
    store = make_store(tmp_path / "capture", 2)
    units = [f"units/{index:06d}-{unit_key(info_of(index))}" for index in range(2)]
    expected = ["capture.json", "complete.json"]
    expected += [f"{unit}/{name}" for unit in units for name in ("data-000.safetensors", "unit.json")]
    assert [str(path.relative_to(store)) for path in files_of(store)] == sorted(expected)
    assert read_sealed(store / "capture.json").body == {"schema": 1, "manifest": MANIFEST | {"prompts": 2}}


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
DTYPES += [torch.bool, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 600), (3, 4, 200), (65, 2)], ids=str)
def test_c6_every_dtype_and_shape(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    # cycles through all the bytes there are; for bool, both
    count = dtype.itemsize * max(torch.Size(shape).numel(), 0)
    raw = torch.arange(count, dtype=torch.int64).remainder(251 if dtype != torch.bool else 2).to(torch.uint8)
    tensor = raw.view(dtype).reshape(shape)
    (found,) = stored_and_read(tmp_path, call(x=tensor))
    back = found.kwargs["x"]
    assert (back.dtype, back.shape) == (dtype, tensor.shape)
    assert back.reshape(-1).view(torch.uint8).equal(raw)


def test_c6_unusual_memory(tmp_path: Path) -> None:
    base = torch.randn(4, 600)
    tensors = {
        "transposed": base.t(),
        "strided": base[:, ::2],
        "view": base[1:3],
        "expanded": base[:1].expand(4, 600),
        "scalar": torch.tensor(3.5),
        "gradient": torch.randn(3, requires_grad=True),
        "graph": torch.randn(3, requires_grad=True) * 2,
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "imaginary": torch.randn(3, dtype=torch.complex64).conj().imag,
        "parameter": torch.nn.Parameter(base.clone()),
        "base": base,
        "again": base,
    }
    (found,) = stored_and_read(tmp_path, call(**tensors))
    for name, tensor in tensors.items():
        assert found.kwargs[name].equal(tensor), name
        assert type(found.kwargs[name]) is torch.Tensor
        assert not found.kwargs[name].requires_grad
    found.kwargs["again"].zero_()
    assert found.kwargs["base"].equal(base)


def test_c6_inference_tensors(tmp_path: Path) -> None:
    with torch.inference_mode():
        tensor = torch.randn(2, 600)
        with CaptureWriter.create(tmp_path, MANIFEST) as writer, writer.unit(0, {}) as unit:
            unit.add(call(x=tensor))
            tensor.add_(1)
            unit.add(call(x=tensor))
    first, second = Capture.open(tmp_path, allow_incomplete=True).calls()
    assert second.kwargs["x"].equal(tensor.clone())
    assert first.kwargs["x"].add_(1).equal(second.kwargs["x"])


UNSTORABLE = {
    "sparse": (torch.eye(2).to_sparse(), "is a sparse_coo tensor"),
    "quantized": (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8), "is a quantized tensor"),
    "meta": (torch.empty(2, device="meta"), "is a meta tensor without values"),
    "complex128": (torch.ones(2, dtype=torch.complex128), "is a tensor of torch.complex128"),
}


@pytest.mark.parametrize("name", UNSTORABLE)
def test_c6_what_cannot_be_stored_is_named_and_leaves_no_trace(tmp_path: Path, name: str) -> None:
    tensor, fact = UNSTORABLE[name]
    good = torch.randn(700)
    with CaptureWriter.create(tmp_path, MANIFEST | {"prompts": 1}) as writer, writer.unit(0, {}) as unit:
        with pytest.raises(CaptureError) as caught:
            unit.add(call(good=good, added={"ids": [tensor]}))
        assert str(caught.value).startswith(f"transformer input 'added.ids[0]': {fact}")
        assert str(caught.value).endswith("exclude it with --drop-input added.")
        assert caught.value.exit_code == 3
        assert (unit.raw_bytes, unit.stored_bytes, unit.calls) == (0, 0, 0)
        unit.add(call(good=good))
        assert (unit.raw_bytes, unit.stored_bytes, unit.calls) == (2800, 2800, 1)
    (found,) = Capture.open(tmp_path, allow_incomplete=True).calls()
    assert found.kwargs["good"].equal(good)


def test_c1_tensors_are_copied_before_add_returns(tmp_path: Path) -> None:
    tensors = {"plain": torch.randn(700), "rows": torch.randn(2, 700), "view": torch.randn(9, 9)[:, 1]}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    container = [torch.ones(3), torch.ones(2)]
    with CaptureWriter.create(tmp_path, MANIFEST) as writer, writer.unit(0, {}) as unit:
        unit.add(call(**tensors, container=container))
        for tensor in tensors.values():
            tensor.zero_()
        container.pop()
        unit.add(call(**tensors, container=container))
    first, second = Capture.open(tmp_path, allow_incomplete=True).calls()
    assert all(first.kwargs[name].equal(before[name]) for name in tensors)
    assert all(second.kwargs[name].equal(tensors[name]) for name in tensors)
    assert (len(first.kwargs["container"]), len(second.kwargs["container"])) == (2, 1)


def test_c1_control_without_copies_the_first_sample_would_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle = unit_module.settle
    monkeypatch.setattr(unit_module, "settle", lambda tensor: (settle(tensor)[0], True))
    with pytest.raises(AssertionError):
        test_c1_tensors_are_copied_before_add_returns(tmp_path)


def test_equal_tensors_and_rows_are_stored_once(tmp_path: Path) -> None:
    latents, states = torch.randn(1, 600), torch.randn(2, 3, 200)
    with CaptureWriter.create(tmp_path, MANIFEST) as writer, writer.unit(0, {}) as unit:
        unit.add(call(x=torch.cat([latents, latents]), states=states))
        assert unit.stored_bytes == 2400 + 4800
        unit.add(call(x=torch.cat([latents, latents * 2]), states=states))
        unit.add(call(x=torch.cat([latents * 2, latents]), states=states.clone(), same=states))
        assert unit.stored_bytes == 2400 + 4800 + 2400
        assert unit.raw_bytes == 3 * (4800 + 4800) + 4800
    stored = Capture.open(tmp_path, allow_incomplete=True).calls()
    assert [one.kwargs["x"][1].equal(latents[0]) for one in stored] == [True, False, True]


def test_a_known_tensor_is_not_hashed_again_but_a_changed_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = []
    key_of = unit_module.key_of
    monkeypatch.setattr(unit_module, "key_of", lambda *parts: hashed.append(1) or key_of(*parts))
    tensor = torch.randn(700)
    counts = []
    with CaptureWriter.create(tmp_path, MANIFEST) as writer, writer.unit(0, {}) as unit:
        for change in (lambda: None, lambda: None, lambda: tensor.add_(1), lambda: tensor[:2].zero_(), lambda: None):
            change()
            unit.add(call(x=tensor))
            counts.append(len(hashed))
        tensor.data = torch.zeros(700)
        unit.add(call(x=tensor))
    assert counts == [1, 1, 2, 3, 3]
    *_, last = Capture.open(tmp_path, allow_incomplete=True).calls()
    assert last.kwargs["x"].equal(torch.zeros(700))


def test_c7_c8_stats_of_float_tensors(tmp_path: Path) -> None:
    clipped = torch.tensor([65504.0, -65504.0, 1.0, -0.0]).half()
    broken = torch.tensor([1.0, float("nan"), float("inf"), -2.0]).bfloat16()
    rows = torch.stack([torch.arange(600.0), -torch.arange(600.0)])
    empty = torch.full((2,), float("nan"))
    with CaptureWriter.create(tmp_path, MANIFEST) as writer, writer.unit(0, {}) as unit:
        kwargs = {"clipped": clipped, "broken": [broken], "rows": rows, "ids": torch.arange(3), "empty": empty}
        kwargs |= {"fp8": torch.tensor([2.0]).to(torch.float8_e5m2), "complex": torch.tensor([1 - 3j])}
        stats = unit.add(call(**kwargs))
        assert stats == unit.last
    assert stats == {
        "clipped": Stats(-65504.0, 65504.0, 0, 2),
        "broken[0]": Stats(-2.0, 1.0, 2, 0),
        "rows": Stats(-599.0, 599.0, 0, 0),
        "empty": Stats(None, None, 2, 0),
        "fp8": Stats(2.0, 2.0, 0, 0),
        "complex": Stats(-3.0, 1.0, 0, 0),
    }
    (told,) = Capture.open(tmp_path, allow_incomplete=True).descriptions()
    assert told.kwargs["broken"][0].stats == stats["broken[0]"]
    assert (told.kwargs["ids"].stats, told.kwargs["ids"].shape) == (None, (3,))


def test_c7_a_call_that_is_not_accepted_is_not_stored(tmp_path: Path) -> None:
    bad, good = torch.full((600,), float("inf")), torch.ones(600)
    with CaptureWriter.create(tmp_path / "a", MANIFEST) as writer, writer.unit(0, {}) as unit:
        for tensor in (bad, good):
            unit.add(call(x=tensor), accept=lambda stats: not any(one.nonfinite for one in stats.values()))
    with CaptureWriter.create(tmp_path / "b", MANIFEST) as writer, writer.unit(0, {}) as unit:
        unit.add(call(x=good))
    digests = [Capture.open(tmp_path / name, allow_incomplete=True).units[0].digest for name in "ab"]
    assert digests[0] == digests[1]


def test_c2_c3_arguments_keep_order_and_types(tmp_path: Path) -> None:
    kwargs = {"z": None, "a": (1, 2.0, [True]), "dtype": torch.float16, "size": torch.Size([2]), "f": float("inf")}
    one = Call("transformer", 3, None, float("-inf"), "cond", (torch.ones(2), "x"), kwargs)
    (found,) = stored_and_read(tmp_path, one)
    assert same(found, one)
    assert list(found.kwargs) == list(kwargs)


def test_parts_are_bounded_and_a_large_tensor_is_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("capture.parts.PART_BYTES", "capture.unit.PART_BYTES"):
        monkeypatch.setattr(module, 4096)
    sizes = [300, 300, 300, 2000, 10, 1020, 1, 5]
    tensors = [torch.randn(size) for size in sizes]
    calls = [call(x=tensor, half=tensor.half()) for tensor in tensors]
    found = stored_and_read(tmp_path, *calls)
    assert all(map(same, found, calls))
    parts = sorted(tmp_path.rglob("*.safetensors"))
    assert [path.name for path in parts] == [f"data-{number:03d}.safetensors" for number in range(len(parts))]
    assert len(parts) > 4
    data = [path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little") for path in parts]
    assert sum(data) == sum(sizes) * 6
    assert [size for size in data if size > 4096] == [8000]


def test_c14_memory_does_not_grow_with_the_units(tmp_path: Path) -> None:
    tensor = torch.randn(2, 1 << 18)  # 2 MiB

    def run() -> None:
        def resident() -> int:
            gc.collect()
            return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

        with CaptureWriter.create(tmp_path, MANIFEST | {"prompts": 50}) as writer:
            for index in range(50):
                with writer.unit(index, {"prompt": index}) as unit:
                    for step in range(2):
                        unit.add(call(x=tensor + index + step))
                if index == 4:
                    before = resident()
            assert resident() - before < 4 << 20

    assert in_child(run) == 0


# Resuming


def test_a_unit_is_dropped_when_its_block_raises(tmp_path: Path) -> None:
    with CaptureWriter.create(tmp_path, MANIFEST) as writer:
        for error in (KeyboardInterrupt, RuntimeError, SystemExit):
            with pytest.raises(error), writer.unit(0, info_of(0)) as unit:
                unit.add(calls_of(0)[0])
                raise error
            assert (writer.stored, os.listdir(tmp_path / "units")) == ({}, [])
        with pytest.raises(CaptureError, match="holds no calls") as caught, writer.unit(0, info_of(0)):
            pass
        assert caught.value.exit_code == 4
        fill(writer, range(3))
        writer.complete()
    assert holds(tmp_path)


def test_resume_goes_on_and_an_index_is_used_once(tmp_path: Path) -> None:
    with CaptureWriter.create(tmp_path, MANIFEST) as writer:
        fill(writer, [1])
        writer.complete()
    with CaptureWriter.create(tmp_path, MANIFEST | {"prompts": 4}, resume=True) as writer:
        assert writer.stored == {1: unit_key(info_of(1))}
        with pytest.raises(CaptureError, match="unit 1 is stored already") as caught, writer.unit(1, {}):
            pass
        assert caught.value.exit_code == 4
        assert (tmp_path / "complete.json").exists()
        fill(writer, [0])
        assert not (tmp_path / "complete.json").exists()
        fill(writer, range(4))
        writer.complete()
    assert holds(tmp_path, 4)
    assert Capture.open(tmp_path).manifest["prompts"] == 4


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"settings": {"steps": 4, "seed": 0}}, "settings.steps 2, now 4"),
        ({"settings": {"steps": 2}}, "settings.seed 0, now None"),
        ({"pipeline": "FluxPipeline"}, "pipeline StableDiffusion3Pipeline, now FluxPipeline"),
        ({"extra": True}, "extra None, now True"),
    ],
)
def test_resume_with_other_settings_names_the_first(tmp_path: Path, change: dict[str, Any], fact: str) -> None:
    make_store(tmp_path)
    expected = f": captured with {fact}. Use the same or another directory."
    assert refused(tmp_path, 4, MANIFEST | change, resume=True) == expected


def test_resume_refuses_a_damaged_unit_until_it_is_deleted(tmp_path: Path) -> None:
    make_store(tmp_path)
    data = sorted(tmp_path.rglob("*.safetensors"))[1]
    data.chmod(0o600)
    data.write_bytes(data.read_bytes()[:-1])
    message = refused(tmp_path, 3, MANIFEST, resume=True)
    assert message.endswith(f"Delete {data.parent} and run capture --resume.")
    shutil.rmtree(data.parent)
    with CaptureWriter.create(tmp_path, MANIFEST, resume=True) as writer:
        fill(writer, range(3))
        writer.complete()
    assert holds(tmp_path)


def test_c13_the_same_calls_give_the_same_digests(tmp_path: Path) -> None:
    def digests(name: str) -> list[str]:
        return [unit.digest for unit in Capture.open(tmp_path / name).units]

    make_store(tmp_path / "once")
    with CaptureWriter.create(tmp_path / "resumed", MANIFEST) as writer:
        fill(writer, [2, 0])
    with CaptureWriter.create(tmp_path / "resumed", MANIFEST, resume=True, group_readable=True) as writer:
        fill(writer, range(3))
        writer.complete()
    assert digests("once") == digests("resumed")
    for name in ("000000", "000002"):
        files = [next((tmp_path / run / "units").glob(f"{name}-*")) for run in ("once", "resumed")]
        assert (files[0] / "unit.json").read_bytes() == (files[1] / "unit.json").read_bytes()


# Faults at every call


def session(directory: Path) -> None:
    """A capture of three prompts from wherever it stands, in units small enough to visit all calls."""
    with CaptureWriter.create(directory, MANIFEST, resume=True) as writer:
        fill(writer, range(3))
        writer.complete()


def committed(directory: Path) -> dict[str, bytes]:
    units = directory / "units"
    return {path.name: (path / "unit.json").read_bytes() for path in units.glob("0*")} if units.exists() else {}


def check_after_fault(directory: Path, at: int) -> None:
    """What is committed is whole; a second session finishes the rest and leaves nothing else."""
    before = committed(directory)
    session(directory)
    assert holds(directory), at
    assert before.items() <= committed(directory).items(), at
    left = [path.name for path in directory.rglob(".*")]
    assert not left, (at, left)


def sites(directory: Path) -> int:
    with counting() as calls:
        session(directory)
    return len(calls.made)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=errno.errorcode.get)
def test_any_failing_call_is_a_storage_error_and_resumable(tmp_path: Path, number: int) -> None:
    for at in range(sites(tmp_path / "whole")):
        directory = tmp_path / str(at)
        with counting(at, failing(number)):
            try:
                session(directory)
            except CaptureError as exc:
                assert (exc.exit_code, str(exc).count("\n")) == (5, 0)
        check_after_fault(directory, at)
        shutil.rmtree(directory)


def test_killed_at_any_call_it_is_resumable(tmp_path: Path) -> None:
    for at in range(sites(tmp_path / "whole")):
        directory = tmp_path / str(at)

        def killed(directory: Path = directory, at: int = at) -> None:
            with counting(at, dying):
                session(directory)

        assert in_child(killed) == 9
        check_after_fault(directory, at)
        shutil.rmtree(directory)


def test_i5_interrupted_at_any_call_a_unit_is_whole_or_absent(tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    for at in range(sites(tmp_path / "whole")):
        directory = tmp_path / str(at)
        with counting(at, interrupt), pytest.raises(KeyboardInterrupt):
            session(directory)
        check_after_fault(directory, at)
        shutil.rmtree(directory)
