"""Types of attention that reach the bound are written as the consumer of the format reads them, and inspect shows
them; formats without such types refuse."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from octavo.calibrate.attention.choice import attention_lines, attention_section
from octavo.calibrate.attention.measure import AttentionRow
from octavo.calibrate.attention.names import COMFY_INT8, FP8, MXFP8
from octavo.calibrate.formats import format_named
from octavo.calibrate.formats.ascend.read import load_ascend
from octavo.calibrate.formats.attention import check_attention, with_attention
from octavo.calibrate.formats.export import export, kept_float
from octavo.calibrate.formats.inspect import check, sound
from octavo.calibrate.layers.install import install
from octavo.calibrate.plan import Plan, make_plan
from octavo.calibrate.result import Result
from octavo.page import page

from ...helpers.refusals import refused
from ...zoo.comfy_models import model as model_of
from ...zoo.hard_sd3 import calibrated, hard, prompts
from ...zoo.layer_kinds import changed, frozen, unlisted

FORMATS = ("ascend", "comfy")
SELF, OTHER, CROSS, LOW = "blocks.0.attn1", "blocks.1.attn1", "blocks.0.attn2", "blocks.1.attn2"


def rows() -> list[AttentionRow]:
    """Returns errors of four modules: SELF reaches the bound in every type, OTHER in MXFP8 only, CROSS in none that its
    consumer computes, except ComfyUI, and LOW in none."""
    batch, cross = "runs on a batch of 2", "is cross-attention"
    table = {
        SELF: ((FP8, 44.0, None), (MXFP8, 41.0, None), (COMFY_INT8, 50.0, None)),
        OTHER: ((FP8, 44.0, batch), (MXFP8, 40.0, None), (COMFY_INT8, 39.9, None)),
        CROSS: ((FP8, 44.0, batch), (MXFP8, 41.0, cross), (COMFY_INT8, 50.0, None)),
        LOW: ((FP8, 30.0, None), (MXFP8, 31.0, None), (COMFY_INT8, 20.0, None)),
    }
    return [
        AttentionRow(module, type, rotation, 16, (60.0, sqnr - (1.0 if rotation == "none" else 0.0)), refusal)
        for module, entries in table.items()
        for type, sqnr, refusal in entries
        for rotation in ("none", "hadamard")
    ]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[nn.Module, Path]:
    """Returns a Wan in bfloat16 with integer layers in it, and its checkpoint in both formats."""
    model = model_of("wan", torch.bfloat16)
    names = make_plan(model, defaults={}).quantized
    names = [name for name in names if name not in kept_float(FORMATS, model, names)]
    layers = {name: frozen(model.get_submodule(name), "W8A8_DYNAMIC") for name in names}
    report = {"attention": attention_section(rows(), 3, held_out=3)}
    install(model, layers)  # as a calibration leaves it
    result = Result(Plan(()), layers, report, attention=rows())
    return model, export(result, model, tmp_path_factory.mktemp("written") / "out", FORMATS)


def test_the_report_says_what_each_module_got_and_what_the_others_have(written):
    section = json.loads((written[1] / "report.json").read_text())["attention"]
    types = {name: {e["module"]: e["type"] for e in entries} for name, entries in section["written"].items()}
    assert types == {
        "ascend": {SELF: FP8, OTHER: MXFP8, CROSS: None, LOW: None},
        "comfy": {SELF: COMFY_INT8, OTHER: None, CROSS: COMFY_INT8, LOW: None},
    }
    by_module = {entry["module"]: entry for entry in section["written"]["ascend"]}
    assert by_module[OTHER]["worst"] == 40.0
    assert by_module[OTHER]["rotation"] == "hadamard"
    assert by_module[LOW]["worst"] == 31.0
    assert by_module[CROSS]["worst"] is None
    ascend, comfy = attention_lines(section)
    assert ascend == (
        "Attention in format ascend: 1 FP8_DYNAMIC, 1 MXFP8_DYNAMIC of 4 modules with at least 40 dB in every head on "
        "3 held-out calls; float: 1 with 31.0 to 31.0 dB, 1 because it runs on a batch of 2; is cross-attention."
    )
    assert "2 comfy_kitchen_int8 of 4 modules" in comfy
    assert "2 with 20.0 to 39.9 dB" in comfy


def test_the_page_shows_the_lines_and_the_modules(written):
    report = json.loads((written[1] / "report.json").read_text())
    totals = {"quantized": 1, "kept_float": 0, "calls": 1, "output_sqnr": None, "output_sqnr_interval": None}
    totals |= {"bytes_before": 2, "bytes_after": 1, "measured_calls": 0, "held_out_calls": 0}
    layer = {"name": "a", "scheme": "W8A8", "shape": [1], "sqnr": 1.0, "bytes_after": 1}
    text = page([{"report": {"totals": totals, "layers": [layer], **report}}]).decode()
    assert "Attention in format ascend" in text
    assert all(module in text for module in (SELF, OTHER, CROSS, LOW))
    assert attention_lines(report["attention"])[1] in text


def test_both_checkpoints_are_sound_and_described(written):
    model, folder = written
    verdicts = check(folder)
    assert sound(verdicts, set(FORMATS))
    facts = {v.consumer: v.fact for v in verdicts if v.subject == "attention"}
    assert "1 FP8_DYNAMIC, 1 MXFP8_DYNAMIC" in facts["MindIE-SD"]
    assert "2 modules in int8" in facts["ComfyUI"]
    for name, words in (("ascend", "1 FP8_DYNAMIC, 1 MXFP8_DYNAMIC"), ("comfy", "2 modules in int8")):
        record = format_named(name)
        assert record.describe is not None
        assert ("attention", words) in record.describe(record.find(folder)).lines
    assert set(load_ascend(folder)) == {name for name, module in model.named_modules() if hasattr(module, "scheme")}


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{SELF}.k_rot"]


def turn(tensors: dict[str, Tensor]) -> None:
    tensors[f"{SELF}.k_rot"] = -tensors[f"{SELF}.k_rot"]


def widen(tensors: dict[str, Tensor]) -> None:
    tensors[f"{SELF}.q_rot"] = tensors[f"{SELF}.q_rot"].repeat(1, 2)


@pytest.mark.parametrize(
    ("change", "words"), [(drop, "k_rot is missing"), (turn, "change the scores"), (widen, "[16, 32]")]
)
def test_rotations_that_mindie_cannot_use_are_found(tmp_path, change, words):
    folder = _linear(tmp_path)
    changed(folder, change)
    bad = {v.subject: v.fact for v in check(folder) if v.consumer == "MindIE-SD" and not v.ok}
    assert words in bad["attention"]


def test_a_type_that_mindie_ignores_is_found(tmp_path):
    folder = _linear(tmp_path)
    unlisted(folder)
    path = next(folder.glob("*description*.json"))
    text = path.read_text().replace('"FP8_DYNAMIC"', '"FP9"')
    path.chmod(0o600)
    path.write_text(text)
    bad = {v.subject: v.fact for v in check(folder) if v.consumer == "MindIE-SD" and not v.ok}
    assert "'FP9'" in bad["attention"]


def _linear(tmp_path: Path) -> Path:
    """Exports a model of one linear in the format ascend, with the attention of `rows`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16))
    report = {"attention": attention_section(rows(), 1)}
    layers = {"0": frozen(model[0], "W8A8_DYNAMIC")}
    return export(Result(Plan(()), layers, report, attention=rows()), model, tmp_path / "out")


def test_formats_without_types_of_attention_refuse():
    for form in ("diffusers", "torchao", "sglang", "sdnq", "vllm-omni"):
        refused(lambda form=form: check_attention((form,), "write"), 2, form, "ascend or comfy", "--attention report")
        check_attention((form,), "report")
    check_attention(FORMATS, "write", model_of("wan"))
    refused(lambda: check_attention(("comfy",), "write", model_of("sd3")), 2, "comfy", "Stable Diffusion 3")


def test_a_calibration_measures_held_out_calls_and_leaves_the_report_alone_without_write():
    model, calls = hard(), prompts(4, 2)
    result = calibrated(model, calls, attention="write", sqnr_calls=8)
    section = result.report["attention"]
    assert section["calls"] == section["held_out"] == 2  # one prompt of four is held out
    assert [row["module"] for row in section["rows"]] == [row.module for row in result.attention]
    assert with_attention(result, model, ("ascend",)).report["attention"]["written"]["ascend"]
    silent = calibrated(model, calls, attention="report", sqnr_calls=8)
    assert not silent.attention
    assert with_attention(silent, model, ("sdnq",)).report == silent.report
