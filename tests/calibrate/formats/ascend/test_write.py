"""An ascend checkpoint has the documented layout, the same bytes each time, and is written whole or not at all."""

import json
import shutil
import stat
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from octavo.calibrate.calibration import calibrate
from octavo.calibrate.formats import TABLE, format_named
from octavo.calibrate.formats.ascend.read import load_ascend
from octavo.calibrate.formats.export import export
from octavo.calibrate.formats.manifest import MANIFEST
from octavo.calibrate.formats.target import check_target, least_size
from octavo.calibrate.layers.freeze import packed, unpacked
from octavo.calibrate.layers.install import install, quantized
from octavo.calibrate.result import Result
from octavo.calibrate.settings import Settings

from ....helpers.examples import some_of
from ....helpers.faults import counting, dying, failing, fast_path, in_child
from ....helpers.refusals import refused
from ....zoo.toy import DTYPES, Block, Call, Toy, calls, source_of, toy

__all__ = ["fast_path"]

W8A8 = ("quant_model_weight_w8a8.safetensors", "quant_model_description_w8a8.json")
W8A16 = ("quant_model_weight_w8a16.safetensors", "quant_model_description_w8a16.json")


def model_and_result(dtype: torch.dtype = torch.float32, **settings) -> tuple[Toy, Result]:
    model = toy(dtype=dtype)
    return model, calibrate(model, source_of(calls(dtype=dtype)), Settings(defaults={}, **settings))


def checkpoint(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.suffix not in (".json", ".manifest") or "quant" in path.name
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_layout(dtype, tmp_path):
    model, result = model_and_result(dtype)
    folder = export(result, model, tmp_path / "out")
    tensors, description = load_file(folder / W8A8[0]), json.loads((folder / W8A8[1]).read_text())
    assert description.pop("model_quant_type") == "W8A8"
    assert set(tensors) == set(description)
    for name, layer in result.layers.items():
        n, k = layer.weight.shape[0], layer.weight[0].numel()
        of = {key: tensors[f"{name}.{key}"] for key in ("input_scale", "input_offset", "deq_scale", "quant_bias")}
        weight = tensors[f"{name}.weight"]
        assert (weight.dtype, weight.shape) == (torch.int8, model.get_submodule(name).weight.shape)
        assert (of["input_scale"].dtype, of["input_scale"].shape) == (dtype, (1,))
        assert (of["input_offset"].dtype, of["input_offset"].shape) == (dtype, (1,))
        assert of["input_offset"] == of["input_offset"].round()
        assert (of["quant_bias"].dtype, of["quant_bias"].shape) == (torch.int32, (n,))
        assert tensors[f"{name}.weight_scale"].shape == tensors[f"{name}.weight_offset"].shape == (n, 1)
        assert not tensors[f"{name}.weight_offset"].any()
        deq = of["deq_scale"]
        assert (deq.dtype, deq.shape) == (torch.float32 if dtype == torch.bfloat16 else torch.int64, (n,))
        deq = deq if dtype == torch.bfloat16 else deq.to(torch.int32).view(torch.float32)
        bias = model.get_submodule(name).bias
        assert (f"{name}.bias" in tensors) == (bias is not None)
        exact = torch.zeros(n).double() if bias is None else bias.double()
        sums = weight.reshape(n, k).long().sum(1) * int(of["input_offset"].item())
        assert torch.equal(of["quant_bias"].double(), (exact / deq.double() - sums.double()).round())
        assert all(description[f"{name}.{key}"] == "W8A8" for key in (*of, "weight", "weight_scale", "weight_offset"))
    floats = {key for key, word in description.items() if word == "FLOAT"}
    assert {"table", "patch.bias"} <= floats
    for key in floats:
        assert torch.equal(tensors[key], model.state_dict()[key])


def test_the_packing_of_the_dequantizer_is_the_bits_of_float32():
    deq = torch.tensor([2.0**-126, 1.0, 3.0e38])
    assert packed(deq).dtype == torch.int64
    assert bool((packed(deq) >= 0).all())
    assert packed(deq)[1] == 0x3F800000
    assert torch.equal(unpacked(packed(deq)), deq)


def test_weight_only(tmp_path):
    model, result = model_and_result(activations="float")
    folder = export(result, model, tmp_path / "out")
    tensors, description = load_file(folder / W8A16[0]), json.loads((folder / W8A16[1]).read_text())
    assert description["model_quant_type"] == description["proj_out.weight"] == "W8A16"
    assert {key.rpartition(".")[2] for key in tensors if key.startswith("proj_out.")} == {
        "weight", "weight_scale", "weight_offset", "bias"
    }  # fmt: skip
    loaded = load_ascend(folder)
    with torch.no_grad():
        x = torch.randn(3, 16)
        assert torch.equal(loaded["proj_out"](x), result.layers["proj_out"](x))


@pytest.mark.parametrize("settings", [{}, {"symmetric": True}, {"observer": "mse"}, {"activations": "float"}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_evaluated_exported_and_loaded_are_the_same_integers_and_the_same_bytes_again(dtype, settings, tmp_path):
    model, result = model_and_result(dtype, **settings)
    one = export(result, model, tmp_path / "one")
    loaded = load_ascend(one)
    assert set(loaded) == set(result.layers)
    for name, layer in result.layers.items():
        wanted, actual = layer.state_dict(), loaded[name].state_dict()
        assert set(wanted) == set(actual)
        assert all(torch.equal(wanted[key], actual[key]) for key in wanted)
    with torch.no_grad():
        x = calls(1, dtype)[0]
        with quantized(model, result.layers):
            evaluated = model(*x.args, **x.kwargs)
        with quantized(model, loaded):
            assert torch.equal(model(*x.args, **x.kwargs), evaluated)
    other = export(Result(result.plan, loaded, result.report), model, tmp_path / "two")
    assert checkpoint(one) == checkpoint(other)
    install(model, loaded)  # the export is the same once the model contains the layers
    third = export(Result(result.plan, loaded, result.report), model, tmp_path / "three")
    assert checkpoint(one) == checkpoint(third)


def test_calibrating_twice_or_releasing_the_weights_gives_the_same_bytes(tmp_path):
    folders = []
    for name, settings in (("a", {}), ("b", {}), ("c", {"release": True})):
        model, result = model_and_result(**settings)
        folders.append(export(result, model, tmp_path / name))
        assert (type(model.proj_out) is nn.Linear) == (name != "c")
    assert checkpoint(folders[0]) == checkpoint(folders[1]) == checkpoint(folders[2])


def test_the_caller_s_model_is_unchanged(tmp_path):
    model, _ = model_and_result()
    untouched = toy()
    export(calibrate(model, source_of(calls()), Settings(defaults={})), model, tmp_path / "out")
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), untouched.state_dict().values(), strict=True)
    )
    assert [type(m) for m in model.modules()] == [type(m) for m in untouched.modules()]


def test_tied_shared_and_strided_tensors(tmp_path):
    model = nn.ModuleDict({"blocks": nn.ModuleList([Block(4), Block(4)]), "head": nn.Linear(4, 8)})
    model["blocks"][1].up = model["blocks"][0].up  # a shared layer
    model["head"].weight = model["blocks"][0].up.weight  # a tied weight
    model["head"].bias.data = torch.randn(8, 2)[:, 0]
    model.register_buffer("strided", torch.randn(3, 4).t())

    def forward(x: torch.Tensor) -> torch.Tensor:
        for block in model["blocks"]:
            x = block(x)
        return model["head"](x)

    model.forward = forward
    result = calibrate(model, source_of([Call((torch.randn(3, 4),), {})]), Settings())
    tensors = load_file(export(result, model, tmp_path / "out") / W8A8[0])
    assert torch.equal(tensors["blocks.0.up.weight"], tensors["blocks.1.up.weight"])
    assert tensors["blocks.1.up.weight"].dtype == torch.int8
    assert torch.equal(tensors["head.weight"], model["head"].weight)
    assert torch.equal(tensors["head.bias"], model["head"].bias)
    assert torch.equal(tensors["strided"], model.strided)


def test_numbers_that_are_not_finite_are_not_written(tmp_path):
    model, result = model_and_result()
    model.table.data[0, 0] = float("nan")
    refused(
        lambda: export(result, model, tmp_path / "out"),
        6,
        "table: was not written, because it has values that are not finite",
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_modes_whatever_the_umask(group, umask, tmp_path):
    model, result = model_and_result()

    def work() -> None:
        import os

        os.umask(umask)
        export(result, model, tmp_path / "deep" / "out", group_readable=group)

    assert in_child(work) == 0
    folder = tmp_path / "deep" / "out"
    wanted = (0o750, 0o440, 0o640, 0o440) if group else (0o700, 0o400, 0o600, 0o400)
    modes = [
        stat.S_IMODE(path.stat().st_mode)
        for path in (folder, folder / W8A8[0], folder / "report.json", folder / MANIFEST)
    ]
    assert tuple(modes) == wanted
    assert stat.S_IMODE((folder / W8A8[1]).stat().st_mode) == wanted[1]


def test_the_description_is_sorted_ends_its_last_line_and_has_no_nan(tmp_path):
    model, result = model_and_result()
    folder = export(result, model, tmp_path / "out")
    text = (folder / W8A8[1]).read_text()
    assert text.endswith("}\n")
    assert list(json.loads(text)) == sorted(json.loads(text))
    assert "NaN" not in text + (folder / "report.json").read_text()
    with safe_open(folder / W8A8[0], "pt") as opened:
        assert opened.metadata()["format"] == "pt"


def test_other_formats_are_named(tmp_path):
    model, result = model_and_result()
    refused(lambda: export(result, model, tmp_path / "out", ("onyx",)), 2, "Choose one of ascend")
    assert next(iter(TABLE)) == "ascend"
    assert [format_named(name).name for name in TABLE] == list(TABLE)


def test_a_second_export_needs_overwrite_and_replaces_files_of_mode_0400(tmp_path):
    model, result = model_and_result()
    export(result, model, tmp_path / "out")
    refused(lambda: export(result, model, tmp_path / "out"), 5, "holds a checkpoint")
    before = (tmp_path / "out" / W8A8[0]).stat().st_ino
    export(result, model, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / W8A8[0]).stat().st_ino != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("fault", ["kill", "full disk"])
def test_a_fault_at_any_system_call_leaves_the_old_checkpoint_or_the_new_one(fault, fast_path):
    model, result = model_and_result()
    other = calibrate(model, source_of(calls()), Settings(defaults={}, symmetric=True))
    new, folder = checkpoint(export(other, model, fast_path / "new")), fast_path / "out"
    old = checkpoint(export(result, model, folder))
    with counting() as counter:
        export(other, model, folder, overwrite=True)
    outcomes = []
    for index in some_of(len(counter.names)):
        export(result, model, folder, overwrite=True)
        assert {path.name for path in fast_path.iterdir()} == {"new", "out"}

        def work(index: int = index) -> None:
            with counting(index, dying if fault == "kill" else failing(28)):
                export(other, model, folder, overwrite=True)

        # failures of listdir (finds leftovers) and close (of the lock) need not fail the export
        assert in_child(work) in (
            (9,) if fault == "kill" else (1, 0) if counter.names[index] in ("listdir", "close") else (1,)
        )
        assert checkpoint(folder) in (old, new)
        outcomes.append(checkpoint(folder) == new)
    assert {True, False} == set(outcomes)
    assert old != new


def test_the_target_is_checked_before_anything_runs(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("x")
    for name, fact in (
        ("file", "not a directory"),
        ("photos", "do not belong to a checkpoint (cat.png)"),
        ("n" * 300, "too long"),
    ):
        for overwrite in (False, True):
            refused(partial(check_target, tmp_path / name, overwrite=overwrite), 5, fact)
    assert (tmp_path / "photos" / "cat.png").read_text() == "x"
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    assert check_target(tmp_path / "link") == tmp_path / "empty"
    assert check_target(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "link", "photos"]


def test_a_directory_that_cannot_be_written_is_refused_first(tmp_path):
    import os

    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    tmp_path.chmod(0o755)

    def work() -> None:
        if os.geteuid() == 0:  # root may write anywhere (CAP_DAC_OVERRIDE), so the child becomes another user
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
        refused(lambda: check_target(locked / "out"), 5, "permission denied for uid")

    parents = [tmp_path, *tmp_path.parents]
    before = {path: path.stat().st_mode for path in parents if "pytest" in str(path)}
    for path in before:
        path.chmod(0o755)
    try:
        assert in_child(work) == 0
    finally:
        for path, mode in before.items():
            path.chmod(stat.S_IMODE(mode))


def on_a_disk_of(free: int, patch: pytest.MonkeyPatch) -> None:
    """Makes every disk report `free` free bytes."""
    patch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=free))


def test_a_full_disk_is_noticed_before_anything_is_written_and_named(tmp_path, monkeypatch):
    model, result = model_and_result()
    needed = least_size(model, result.layers)
    written = export(result, model, tmp_path / "whole")
    assert needed <= sum(path.stat().st_size for path in written.glob("quant_model_weight*"))
    assert needed > sum(layer.weight.numel() for layer in result.layers.values())
    out = tmp_path / "a" / "b"
    on_a_disk_of(needed - 1, monkeypatch)
    message = refused(lambda: export(result, model, out), 5, "is free", "another directory")
    assert message.startswith(f"{out}: needs about ")
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    on_a_disk_of(needed, monkeypatch)
    export(result, model, out)


def test_a_disk_that_fills_up_while_a_checkpoint_is_written_is_named_by_the_user_s_path(tmp_path):
    model, result = model_and_result()
    with counting() as counter:
        export(result, model, tmp_path / "whole")
    for index in [index for index, name in enumerate(counter.names) if name == "write"]:
        with counting(index, failing(28)):
            message = refused(lambda: export(result, model, tmp_path / "out"), 5, "no space left")
        assert message.startswith(f"{tmp_path / 'out'}: ")
