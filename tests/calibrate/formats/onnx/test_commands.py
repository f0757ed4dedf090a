"""The public API and the commands export, check and inspect ONNX graphs as documented."""

import inspect
import json
import re
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification

from octavo import Calibrator, QuantConfig
from octavo.calibrate.calibration import calibrate_folded
from octavo.calibrate.formats.export import check_formats, export
from octavo.calibrate.replay.user_data import Sample
from octavo.calibrate.settings import Settings
from octavo.pipelines.digits.data import digits, write_pictures
from octavo.pipelines.digits.train import PREPROCESSING

from ....helpers.commands import errors, octavo
from ....helpers.refusals import refused
from ....zoo.convolutions import pictures, small, with_statistics
from ....zoo.graphs import by_hand, on_ascend, step

FILES = ["tiny_fp.onnx", "tiny_quant.onnx", "tiny_quant_qdq.onnx"]


@pytest.fixture(scope="module")
def calibrated():
    config = QuantConfig(
        disable_names=["head"], amp_num=0, input_shape=[1, 3, 12, 12],
        keep_acc={"admm": [False, 1000], "easy_quant": [False, 1000], "round_opt": False}, sigma=25,
    )  # fmt: skip
    calibrator = Calibrator(small(), config, pictures(3))
    calibrator.run()
    return calibrator


@pytest.fixture(scope="module")
def exported(calibrated, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx") / "out"
    calibrated.export_quant_onnx("tiny", str(folder), ["input.1"], save_fp=True)
    return folder


def test_the_documented_recipe(calibrated, exported):
    assert sorted(path.name for path in exported.iterdir()) == ["octavo-tiny.manifest", *FILES]
    assert all((exported / name).stat().st_mode & 0o777 == 0o400 for name in FILES)
    x = torch.randn(5, 3, 12, 12, generator=torch.Generator().manual_seed(4))
    outputs = {}
    for name in ("tiny_fp.onnx", "tiny_quant_qdq.onnx"):
        session = onnxruntime.InferenceSession(str(exported / name), providers=["CPUExecutionProvider"])
        outputs[name] = session.run(None, {"input.1": x.numpy()})[0]
    exact = calibrated.model(x).numpy()
    assert np.allclose(outputs["tiny_fp.onnx"], exact, atol=1e-5)
    assert 0 < np.abs(outputs["tiny_quant_qdq.onnx"] - exact).max() < 0.2 * np.abs(exact).max()
    device = on_ascend(onnx.load(exported / "tiny_quant.onnx"), x)
    assert np.abs(device - outputs["tiny_quant_qdq.onnx"]).max() <= step(device)


def test_signature_is_the_documented_one():
    parameters = inspect.signature(Calibrator.export_quant_onnx).parameters
    assert list(parameters) == ["self", "model_arch", "save_path", "input_names", "fuse_add", "save_fp"]
    assert [parameters[name].default for name in list(parameters)[3:]] == [None, True, False]


def test_a_second_export_is_the_same_bytes_among_other_files(calibrated, exported):
    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    (exported / "mine.txt").write_text("mine")
    (exported / "tiny_fp.onnx").unlink()
    (exported / "tiny_fp.onnx").symlink_to(exported / "mine.txt")
    calibrated.export_quant_onnx("tiny", exported, save_fp=True)
    assert (exported / "mine.txt").read_text() == "mine"
    (exported / "mine.txt").unlink()
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == before


@pytest.mark.parametrize("arch", ["../up", "a/b", "", "a\nb"])
def test_invalid_model_names_are_refused(calibrated, tmp_path, arch):
    refused(lambda: calibrated.export_quant_onnx(arch, tmp_path), 2, re.compile(r"^model_arch: "))
    assert not list(tmp_path.iterdir())


def test_a_path_that_is_a_file(calibrated, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(lambda: calibrated.export_quant_onnx("tiny", tmp_path / "file"), 5, "not a directory")


def test_a_missing_onnx_package_is_reported(calibrated, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    for call in (lambda: calibrated.export_quant_onnx("tiny", tmp_path), lambda: check_formats(["ascend", "onnx"])):
        refused(call, 2, "onnx is not installed. Install octavo[onnx]")
    check_formats(["ascend"])


@pytest.mark.parametrize(
    ("name", "runtime", "ascend"), zip(FILES, (True, False, True), (True, True, False), strict=True)
)
def test_inspect(exported, name, runtime, ascend):
    output = octavo("inspect", exported / name)
    assert ("yes onnxruntime" in output) == runtime
    assert ("yes Ascend" in output) == ascend
    assert "opset     18" in output
    assert "input.1 (batch, 3, 12, 12)" in output
    event = json.loads(octavo("inspect", exported / name, "--json"))
    assert event["sound"]
    schemes = {"float": 6} if name == "tiny_fp.onnx" else {"float": 1, "W8A8": 5}
    assert event["schemes"] == schemes
    assert [x["name"] for x in event["layers"] if x["scheme"] == "float"][-1] == "head"


def changed(exported, tmp_path, change):
    proto = onnx.load(exported / "tiny_quant.onnx")
    change(proto.graph)
    path = tmp_path / "changed.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def tensor(graph, end):
    return next(initializer for initializer in graph.initializer if initializer.name.endswith(end))


def node(graph, kind):
    return next(operator for operator in graph.node if operator.op_type == kind)


CHANGES = {
    "does not hold the bits of positive": lambda graph: setattr(tensor(graph, "deq_scale"), "raw_data", b"\xff" * 64),
    "could overflow int32": lambda graph: setattr(tensor(graph, "stem.0.bias"), "raw_data", b"\xff\xff\xff\x7f" * 8),
    "float32 with a bias": lambda graph: tensor(graph, "stem.0.weight").CopyFrom(
        onnx.numpy_helper.from_array(np.ones((8, 3, 3, 3), np.float32), "stem.0.weight")
    ),
    "1 scales for 8 outputs": lambda graph: tensor(graph, "stem.0.deq_scale").CopyFrom(
        onnx.numpy_helper.from_array(np.ones(1, np.uint64), "stem.0.deq_scale")
    ),
    "scale is 0.0": lambda graph: setattr(node(graph, "AscendQuant").attribute[2], "f", 0.0),
    "no integer layer before this AscendDequant": lambda graph: setattr(node(graph, "Conv"), "op_type", "ConvInteger"),
}


@pytest.mark.parametrize("word", CHANGES)
def test_inspect_finds_numbers_that_no_export_writes(exported, tmp_path, word):
    path = changed(exported, tmp_path, CHANGES[word])
    output = octavo("inspect", path, code=3)
    assert "no  octavo" in output
    assert word in output


def test_inspect_refuses_what_it_cannot_trust(tmp_path):
    path = tmp_path / "new.onnx"
    path.write_bytes(by_hand(opset=999).SerializeToString())
    output = octavo("inspect", path, code=3)
    assert errors(output) == [
        f"Error: {path}: opset 999 is newer than {onnx.defs.onnx_opset_version()}, the newest that onnx "
        f"{onnx.__version__} knows. Upgrade onnx, or export for an older version."
    ]
    path.write_bytes(b"")
    assert json.loads(octavo("inspect", path, "--json", code=3).splitlines()[0])["sound"] is False


def test_the_command_writes_all_formats(tmp_path):
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=3)
    with_statistics(ResNetForImageClassification(config)).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING))
    images = write_pictures(digits()[0].pictures[:4], tmp_path / "pictures")
    command = ("calibrate", "--pipeline", "cnn", tmp_path / "model", tmp_path / "out", "--images", images)
    assert "4 layers in 8-bit integers" in octavo(*command, "--format", "ascend,onnx,ascend-onnx")
    graphs = ["model_quant.onnx", "model_quant_qdq.onnx"]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.onnx")) == graphs
    output = octavo("inspect", tmp_path / "out")
    assert all(word in output for word in (*graphs, "an Ascend checkpoint", "4 W8A8"))
    assert "holds a checkpoint" in octavo(*command, "--format", "onnx", code=5)
    (tmp_path / "out" / graphs[0]).unlink()
    (tmp_path / "out" / graphs[0]).write_bytes(b"")
    assert "damaged (" in octavo("inspect", tmp_path / "out", code=3)


def test_a_format_that_has_no_form_for_a_layer(tmp_path):
    result, folded = calibrate_folded(
        small(), lambda: [Sample((x,), {}) for x in pictures(2)], Settings(activations="dynamic")
    )
    refused(
        lambda: export(result, folded, tmp_path / "out", ("ascend", "ascend-onnx")),
        2,
        "format ascend-onnx: cannot hold layer stem.0, whose scheme is W8A8_DYNAMIC",
    )
    assert not (tmp_path / "out").exists()
