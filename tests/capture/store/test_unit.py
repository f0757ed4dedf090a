"""Checks that the calls that are read from a unit are those that were written."""

import gc
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.capture.errors import OctavoError
from octavo.capture.sealed import read_sealed
from octavo.capture.store import unit as unit_module
from octavo.capture.store.reader import Capture
from octavo.capture.store.stats import Stats
from octavo.capture.store.tree import MAX_DEPTH
from octavo.capture.store.writer import Call, CaptureWriter, unit_key

from ...helpers.faults import in_child
from ...helpers.refusals import refused
from ...helpers.stores import MANIFEST, files_of, info_of, make_store, same


def call(**kwargs: Any) -> Call:
    return Call("transformer", 0, 0, 1.0, None, (), kwargs)


def stored_and_read(directory: Path, *calls: Call) -> list[Call]:
    with CaptureWriter.create(directory, MANIFEST) as writer:
        with writer.unit(0, {}) as unit:
            for one in calls:
                unit.add(one)
        writer.complete()
    return list(Capture.open(directory).calls())


def test_the_layout_is_the_documented_one(tmp_path: Path) -> None:
    store = make_store(tmp_path / "capture", 2)
    units = [f"units/{index:06d}-{unit_key(info_of(index))}" for index in range(2)]
    expected = ["capture.json", "complete.json"]
    expected += [f"{unit}/{name}" for unit in units for name in ("data-000.safetensors", "unit.json")]
    assert [str(path.relative_to(store)) for path in files_of(store)] == sorted(expected)
    assert read_sealed(store / "capture.json").body == {"schema": 1, "manifest": MANIFEST | {"prompts": 2}}


def test_a_dimension_of_one_may_have_any_stride(tmp_path: Path) -> None:
    expanded = torch.tensor(981.0).expand(1)  # pipelines pass such timesteps: contiguous, with stride 0
    assert expanded.stride() == (0,)
    (back,) = stored_and_read(tmp_path, call(timestep=expanded))
    assert torch.equal(back.kwargs["timestep"], expanded)


def test_the_order_of_dimensions_in_memory_is_kept(tmp_path: Path) -> None:
    plain = torch.arange(2 * 4 * 8 * 64.0).view(2, 4, 8, 64)
    last = plain.contiguous(memory_format=torch.channels_last)
    one = plain[:1, :1].contiguous(memory_format=torch.channels_last)
    tensors = [plain, last, plain.mT, one, plain[:1].expand(3, 4, 8, 64)]
    (back,) = stored_and_read(tmp_path, call(x=tensors))
    for tensor, read in zip(tensors, back.kwargs["x"], strict=True):
        assert torch.equal(read, tensor)
    assert [read.stride() for read in back.kwargs["x"][:3]] == [tensor.stride() for tensor in tensors[:3]]


def test_channels_of_a_condition_are_stored_once(tmp_path: Path) -> None:
    condition = torch.randn(1, 20, 2, 16, 16)
    steps = [
        torch.cat([torch.randn(1, 16, 2, 16, 16), condition], 1) for _ in range(4)
    ]  # the calls of Wan's image-to-video
    back = stored_and_read(tmp_path, *(call(hidden_states=step) for step in steps))
    assert all(torch.equal(one.kwargs["hidden_states"], step) for one, step in zip(back, steps, strict=True))
    (unit,) = Capture.open(tmp_path).units
    assert unit.stored_bytes == condition.nbytes + 4 * steps[0][:, :16].nbytes


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
DTYPES += [torch.bool, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 600), (3, 4, 200), (65, 2)], ids=str)
def test_every_dtype_and_shape_comes_back(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    # cycles through the byte values 0 to 250; for bool, 0 and 1
    count = dtype.itemsize * max(torch.Size(shape).numel(), 0)
    raw = torch.arange(count, dtype=torch.int64).remainder(251 if dtype != torch.bool else 2).to(torch.uint8)
    tensor = raw.view(dtype).reshape(shape)
    (stored,) = stored_and_read(tmp_path, call(x=tensor))
    back = stored.kwargs["x"]
    assert (back.dtype, back.shape) == (dtype, tensor.shape)
    assert back.reshape(-1).view(torch.uint8).equal(raw)


def test_unusual_memory_layouts_come_back(tmp_path: Path) -> None:
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
    (stored,) = stored_and_read(tmp_path, call(**tensors))
    for name, tensor in tensors.items():
        assert stored.kwargs[name].equal(tensor), name
        assert type(stored.kwargs[name]) is torch.Tensor
        assert not stored.kwargs[name].requires_grad
    stored.kwargs["again"].zero_()
    assert stored.kwargs["base"].equal(base)


def test_inference_tensors_come_back(tmp_path: Path) -> None:
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
    "sparse": (lambda: torch.eye(2).to_sparse(), "is a sparse_coo tensor"),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8), "is a quantized tensor"),
    "meta": (lambda: torch.empty(2, device="meta"), "is a meta tensor without values"),
    "complex128": (lambda: torch.ones(2, dtype=torch.complex128), "is a tensor of torch.complex128"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", UNSTORABLE)
def test_a_tensor_that_cannot_be_stored_is_named_and_leaves_no_trace(tmp_path: Path, name: str) -> None:
    make, fact = UNSTORABLE[name]
    tensor = make()
    good = torch.randn(700)
    with CaptureWriter.create(tmp_path, MANIFEST | {"prompts": 1}) as writer, writer.unit(0, {}) as unit:
        message = refused(lambda: unit.add(call(good=good, added={"ids": [tensor]})), 3)
        assert message.startswith(f"transformer input 'added.ids[0]': {fact}")
        assert message.endswith("or leave it out.")
        assert (unit.raw_bytes, unit.stored_bytes, unit.calls) == (0, 0, 0)
        unit.add(call(good=good))
        assert (unit.raw_bytes, unit.stored_bytes, unit.calls) == (2800, 2800, 1)
    (stored,) = Capture.open(tmp_path, allow_incomplete=True).calls()
    assert stored.kwargs["good"].equal(good)


def test_tensors_are_copied_before_add_returns(tmp_path: Path) -> None:
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


def test_control_without_copies_the_first_sample_would_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle = unit_module.settle
    monkeypatch.setattr(unit_module, "settle", lambda tensor: (settle(tensor)[0], True))
    with pytest.raises((AssertionError, OctavoError)):
        test_tensors_are_copied_before_add_returns(tmp_path)


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


def test_float_tensors_have_stats(tmp_path: Path) -> None:
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
    (description,) = Capture.open(tmp_path, allow_incomplete=True).descriptions()
    assert description.kwargs["broken"][0].stats == stats["broken[0]"]
    assert (description.kwargs["ids"].stats, description.kwargs["ids"].shape) == (None, (3,))


def test_a_call_that_is_not_accepted_is_not_stored(tmp_path: Path) -> None:
    bad, good = torch.full((600,), float("inf")), torch.ones(600)
    with CaptureWriter.create(tmp_path / "a", MANIFEST) as writer, writer.unit(0, {}) as unit:
        for tensor in (bad, good):
            unit.add(call(x=tensor), accept=lambda stats: not any(one.nonfinite for one in stats.values()))
    with CaptureWriter.create(tmp_path / "b", MANIFEST) as writer, writer.unit(0, {}) as unit:
        unit.add(call(x=good))
    digests = [Capture.open(tmp_path / name, allow_incomplete=True).units[0].digest for name in "ab"]
    assert digests[0] == digests[1]


def test_arguments_nested_as_deep_as_allowed_come_back(tmp_path: Path) -> None:
    value: Any = torch.ones(1)
    for _ in range(MAX_DEPTH):
        value = {"inner": value}
    one = Call("transformer", 0, 0, 0.0, None, (value,), {"x": value})
    assert same(stored_and_read(tmp_path, one), [one])


def test_arguments_keep_order_and_types(tmp_path: Path) -> None:
    kwargs = {"z": None, "a": (1, 2.0, [True]), "dtype": torch.float16, "size": torch.Size([2]), "f": float("inf")}
    one = Call("transformer", 3, None, float("-inf"), "cond", (torch.ones(2), "x"), kwargs)
    (stored,) = stored_and_read(tmp_path, one)
    assert same(stored, one)
    assert list(stored.kwargs) == list(kwargs)


def test_parts_are_bounded_and_a_large_tensor_is_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("octavo.capture.store.part_writer.PART_BYTES", "octavo.capture.store.unit.PART_BYTES"):
        monkeypatch.setattr(module, 4096)
    sizes = [300, 300, 300, 2000, 10, 1020, 1, 5]
    tensors = [torch.randn(size) for size in sizes]
    calls = [call(x=tensor, half=tensor.half()) for tensor in tensors]
    stored = stored_and_read(tmp_path, *calls)
    assert all(map(same, stored, calls))
    parts = sorted(tmp_path.rglob("*.safetensors"))
    assert [path.name for path in parts] == [f"data-{number:03d}.safetensors" for number in range(len(parts))]
    assert len(parts) > 4
    data = [path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little") for path in parts]
    assert sum(data) == sum(sizes) * 6
    assert [size for size in data if size > 4096] == [8000]


def test_memory_does_not_grow_with_the_units(tmp_path: Path) -> None:
    tensor = torch.randn(2, 1 << 17)  # 1 MiB

    def run() -> None:
        def resident() -> int:
            gc.collect()
            return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

        with CaptureWriter.create(tmp_path, MANIFEST | {"prompts": 30}) as writer:
            for index in range(30):
                with writer.unit(index, {"prompt": index}) as unit:
                    for step in range(2):
                        unit.add(call(x=tensor + index + step))
                if index == 4:
                    before = resident()
            assert resident() - before < 10 << 20  # 50 MiB were written since; an allocator may keep some of them

    assert in_child(run) == 0
