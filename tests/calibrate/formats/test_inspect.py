"""`check` gives correct verdicts on ascend checkpoints, and files that no export writes are refused."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo.calibrate.calibration import calibrate
from octavo.calibrate.formats.ascend.read import load_ascend
from octavo.calibrate.formats.export import export
from octavo.calibrate.formats.inspect import check, shown_formats
from octavo.calibrate.settings import Settings

from ...helpers.refusals import refused
from ...zoo.toy import calls, source_of, toy

WEIGHTS, DESCRIPTION = "quant_model_weight_w8a8.safetensors", "quant_model_description_w8a8.json"


def written(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    model = toy(dtype=dtype)
    result = calibrate(model, source_of(calls(dtype=dtype)), Settings(defaults={}, sqnr_calls=0))
    return export(result, model, folder / "out")


def failed(folder: Path) -> list[str]:
    verdicts = [v for v in check(folder) if not v.ok and v.consumer != "SGLang"]
    return [f"{v.consumer} {v.subject}: {v.fact}" for v in verdicts]


def changed(folder: Path, **tensors: torch.Tensor | None) -> None:
    path = folder / WEIGHTS
    stored = load_file(path)
    with_metadata = {"octavo.geometry": json.dumps({"patch": GEOMETRY})}
    stored.update({name.replace("__", "."): tensor for name, tensor in tensors.items()})
    path.unlink()
    save_file({name: tensor for name, tensor in stored.items() if tensor is not None}, path, with_metadata)
    path.chmod(0o400)


GEOMETRY = {"stride": [1, 1], "padding": [1, 1, 1, 1], "dilation": [1, 1], "padding_mode": "zeros"}


def test_a_fresh_checkpoint_loads_wherever_its_dtype_does(tmp_path):
    assert failed(written(tmp_path / "a", torch.bfloat16)) == NO_OTHERS
    assert failed(written(tmp_path / "b", torch.float16)) == [
        "MindIE-SD in bfloat16: deq_scale is int64, which works in float16 only. Calibrate the model in bfloat16",
        *NO_OTHERS,
    ]


NO_OTHERS = [
    f"{record.consumer} files: not in this checkpoint. Calibrate with --format {record.name}"
    for record in shown_formats()
    if record.name not in ("ascend", "sglang")
]


def test_convolutions_are_reported_to_stay_float(tmp_path):
    facts = [v.fact for v in check(written(tmp_path)) if v.subject == "Conv2d"]
    assert facts == ["1 stay float in MindIE-SD, which quantizes linears only"]


def test_modes_and_links(tmp_path):
    folder = written(tmp_path)
    (folder / WEIGHTS).chmod(0o644)
    folder.chmod(0o755)
    assert any("mode 0644 allows more than 0640" in line for line in failed(folder))
    assert any("mode 0755 allows more than 0750" in line for line in failed(folder))
    (folder / WEIGHTS).rename(tmp_path / "elsewhere")
    (folder / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    assert any("is a symbolic link" in line for line in failed(folder))


@pytest.mark.parametrize(
    ("tensors", "fact"),
    [
        ({"proj_out__quant_bias": None}, "proj_out.quant_bias is missing"),
        ({"proj_out__quant_bias": torch.zeros(3, dtype=torch.int32)}, "proj_out.quant_bias is int32 [3]"),
        ({"proj_out__deq_scale": torch.full((4,), -1)}, "not the bits of a positive float32"),
        ({"proj_out__deq_scale": torch.zeros(4, dtype=torch.int64)}, "deq_scale is not positive"),
        ({"proj_out__input_scale": torch.zeros(1)}, "input_scale is not positive"),
        ({"proj_out__input_scale": torch.full((1,), float("nan"))}, "input_scale is not positive"),
        ({"proj_out__input_offset": torch.full((1,), 0.5)}, "input_offset is 0.5"),
        ({"proj_out__input_offset": torch.full((1,), -129.0)}, "input_offset is -129.0"),
        ({"proj_out__input_offset": torch.full((1,), float("nan"))}, "input_offset is nan"),
        ({"proj_out__weight": torch.full((4, 16), -128, dtype=torch.int8)}, "weight holds -128"),
        ({"proj_out__quant_bias": torch.full((4,), -(2**31), dtype=torch.int32)}, "could overflow int32"),
        ({"proj_out__weight_scale": torch.full((4, 1), float("inf"))}, "weight_scale is not positive"),
        ({"stranger": torch.zeros(1)}, "stranger is not described"),
        ({"table": None}, "table is described but missing"),
    ],
)
def test_what_no_export_writes_is_named(tensors, fact, tmp_path):
    folder = written(tmp_path)
    changed(folder, **tensors)
    assert any(fact in line for line in failed(folder)), failed(folder)
    if "described" not in fact:
        refused(lambda: load_ascend(folder), 3)


def test_names_that_the_consumer_would_not_find(tmp_path):
    folder = written(tmp_path)
    (folder / DESCRIPTION).rename(folder / "quant_model_description_w8a16.json")
    (folder / WEIGHTS).rename(folder / "quant_model_weight_w8a16.safetensors")
    assert any("looks for quant_model_weight_w8a8.safetensors" in line for line in failed(folder))


def test_a_missing_checkpoint_is_a_verdict(tmp_path):
    assert "no ascend checkpoint" in failed(tmp_path)[0]
    assert "no ascend checkpoint" in failed(tmp_path / "nowhere")[0]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}', '{"model_quant_type": "W4A4"}', "\xff"])
def test_invalid_descriptions_are_refused(text, tmp_path):
    folder = written(tmp_path)
    (folder / DESCRIPTION).unlink()
    (folder / DESCRIPTION).write_bytes(text.encode("latin-1"))
    refused(lambda: load_ascend(folder), 3)
    assert failed(folder)


def header(entries: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str = "I8", shape: tuple = (4,), offsets: tuple = (0, 4)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        header({}, length=2**63),
        header({}, length=100 << 20),
        header({"a": entry()}, b"123"),
        header({"a": entry()}, b"12345"),
        header({"a": entry(shape=(5,))}, b"1234"),
        header({"a": entry(shape=(-4,))}, b"1234"),
        header({"a": entry(dtype="I9")}, b"1234"),
        header({"a": entry(offsets=(1, 5))}, b"12345"),
        header({"a": entry(), "b": entry()}, b"1234"),
        header({"a": entry(), "b": entry(offsets=(2, 6))}, b"123456"),
        header({"a": entry(offsets=(4, 0))}, b"1234"),
        header({"a": entry(shape=(True, 4))}, b"1234"),
        header([1]),
        header({"a": 5}),
        header({"a": entry(), "__metadata__": 7}, b"1234"),
    ],
)
def test_files_that_are_no_safetensors_are_refused_before_their_sizes_are_believed(content, tmp_path):
    folder = written(tmp_path)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).write_bytes(content)
    refused(lambda: load_ascend(folder), 3, str(folder / WEIGHTS))


def test_an_unknown_geometry_is_refused(tmp_path):
    folder = written(tmp_path)
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    save_file(tensors, folder / WEIGHTS)
    refused(lambda: load_ascend(folder), 3, "does not give stride, padding and dilation of the convolution")
