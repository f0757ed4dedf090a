"""ONNX files are written whole, and damaged or unsafe ones are refused. The undamaged file is read as a control."""

import os
from functools import partial

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from octavo.calibrate.formats.onnx.files import DATA, write_graphs, write_model
from octavo.calibrate.formats.onnx.read import read_graph
from octavo.capture.files import Modes

from ....helpers.refusals import refused
from ....zoo.graphs import by_hand

SIZE = 1000  # values of the float32 tensor: 4000 bytes, above the 1024 that always stay in the graph's file


def written(folder, **options):
    path = folder / "model.onnx"
    write_model(by_hand(size=SIZE), path, 0o600, **options)
    return path


LISTED = "octavo-model.manifest"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def changed(path, **entries):
    """Rewrites the file with other entries for its external tensor. The value None removes an entry."""
    proto = onnx.load(path, load_external_data=False)
    tensor = proto.graph.initializer[0]
    values = {entry.key: entry.value for entry in tensor.external_data} | entries
    del tensor.external_data[:]
    for key, value in values.items():
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    path.write_bytes(proto.SerializeToString())


def refused_read(path, word, named=None):
    refused(lambda: read_graph(path), 3, word, str(named or path))


def test_small_tensors_are_in_the_file_and_large_ones_beside_it(tmp_path):
    inside = written(tmp_path)
    assert names(tmp_path) == ["model.onnx"]
    assert read_graph(inside).external == 0
    inside.unlink()
    path = written(tmp_path, largest=2000)
    assert names(tmp_path) == ["model.onnx", "model.onnx.data"]
    graph = read_graph(path)
    assert graph.external == 4 * SIZE
    assert graph.size < 1000
    assert np.array_equal(graph.array(graph.proto.graph.initializer[0]), np.arange(SIZE, dtype=np.float32))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert np.array_equal(session.run(None, {"x": np.zeros(SIZE, np.float32)})[0], np.arange(SIZE, dtype=np.float32))


def test_data_are_replaced_and_never_appended_to(tmp_path):
    def fill(staged):
        written(staged, largest=2000)

    out = tmp_path / "out"
    sizes = []
    for _ in range(3):
        write_graphs(out, fill, Modes(), "model")
        sizes.append({path.name: path.stat().st_size for path in out.iterdir()})
    assert sizes[0] == sizes[1] == sizes[2]
    assert sizes[0]["model.onnx.data"] == 4 * SIZE
    assert out.stat().st_mode & 0o777 == 0o700
    (out / "notes.txt").write_text("mine")
    write_graphs(out, lambda staged: written(staged) and None, Modes(), "model")
    assert names(out) == ["model.onnx", "notes.txt", LISTED]  # the data file of the earlier graph is deleted


def test_links_at_the_target_are_replaced_and_not_followed(tmp_path):
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "out"
    elsewhere.write_text("untouched")
    out.mkdir()
    for name in ("model.onnx", "model.onnx" + DATA):
        (out / name).symlink_to(elsewhere)
    write_graphs(out, lambda staged: written(staged, largest=2000) and None, Modes(), "model")
    assert elsewhere.read_text() == "untouched"
    assert not any(path.is_symlink() for path in out.iterdir())
    assert read_graph(out / "model.onnx").external == 4 * SIZE


def test_a_failure_leaves_the_earlier_graph(tmp_path):
    write_graphs(tmp_path / "out", lambda staged: written(staged) and None, Modes(), "model")
    before = (tmp_path / "out" / "model.onnx").read_bytes()

    def fails(staged):
        write_model(by_hand(size=4), staged / "model.onnx", 0o600)
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError):
        write_graphs(tmp_path / "out", fails, Modes(), "model")
    assert (tmp_path / "out" / "model.onnx").read_bytes() == before
    assert names(tmp_path / "out") == ["model.onnx", LISTED]


@pytest.mark.parametrize(
    "location",
    ["../secret", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "sub/../model.onnx.data", "./model.onnx.data"],
)
def test_data_outside_the_directory(tmp_path, location):
    (tmp_path / "secret").write_bytes(bytes(4 * SIZE))
    (tmp_path / "in").mkdir()
    path = written(tmp_path / "in", largest=2000)
    changed(path, location=location)
    refused_read(path, "outside the graph's directory")


def test_data_that_are_a_link(tmp_path):
    path = written(tmp_path, largest=2000)
    data = tmp_path / "model.onnx.data"
    data.rename(tmp_path / "real")
    data.symlink_to(tmp_path / "real")
    refused_read(path, "symbolic link", data)
    data.unlink()
    os.link(tmp_path / "real", data)
    refused_read(path, "hard link", data)
    (tmp_path / "real").unlink()
    read_graph(path)


def test_data_that_are_no_file(tmp_path):
    path = written(tmp_path, largest=2000)
    data = tmp_path / "model.onnx.data"
    data.unlink()
    refused_read(path, "missing", data)
    os.mkfifo(data)
    refused_read(path, "not a regular file", data)
    data.unlink()
    data.mkdir()
    refused_read(path, "not a regular file", data)


@pytest.mark.parametrize(
    ("entries", "word"),
    [
        ({"length": 10**15}, "has 1000000000000000 bytes in this file, but needs 4000"),
        ({"length": 3999}, "has 3999 bytes in this file, but needs 4000"),
        ({"length": -1}, "'-1' is not"),
        ({"length": "9" * 400}, "is not a valid offset"),
        ({"offset": -1}, "'-1' is not"),
        ({"offset": "1e3"}, "is not a valid offset"),
        ({"offset": 4}, "ends at byte 4004, but the file has 4000 bytes"),
        ({"offset": 10**18, "length": None}, "ends at byte"),
    ],
)
def test_offsets_and_lengths_beyond_the_file_are_refused(tmp_path, entries, word):
    path = written(tmp_path, largest=2000)
    changed(path, **entries)
    refused_read(path, word, tmp_path / "model.onnx.data")


def test_data_that_are_too_short(tmp_path):
    path = written(tmp_path, largest=2000)
    os.truncate(tmp_path / "model.onnx.data", 4 * SIZE - 1)
    refused_read(path, "ends at byte 4000, but the file has 3999 bytes", tmp_path / "model.onnx.data")


def test_a_tensor_of_an_impossible_shape_is_refused(tmp_path):
    path = written(tmp_path, largest=2000)
    proto = onnx.load(path, load_external_data=False)
    proto.graph.initializer[0].dims[:] = [10**6, 10**9]
    path.write_bytes(proto.SerializeToString())
    refused_read(path, "needs 4000000000000000", tmp_path / "model.onnx.data")


def test_external_tensors_are_found_wherever_they_are(tmp_path):
    path = written(tmp_path)
    proto = onnx.load(path)
    tensor = onnx.TensorProto(name="hidden", data_type=1, dims=[1], data_location=1)
    tensor.external_data.add(key="location", value="/etc/passwd")
    branch = helper.make_graph([helper.make_node("Constant", [], ["c"], value=tensor)], "b", [], [])
    proto.graph.node.append(helper.make_node("If", ["x"], ["c"], then_branch=branch, else_branch=branch))
    path.write_bytes(proto.SerializeToString())
    refused_read(path, "tensor hidden has its data outside")


def test_files_that_are_no_graph(tmp_path):
    sound = written(tmp_path)
    data = sound.read_bytes()
    read_graph(sound)
    path = tmp_path / "other.onnx"
    for content, word in (
        (data[:-7], "truncated, or not ONNX"),
        (data[: len(data) // 2], "truncated, or not ONNX"),
        (b"", "the graph has no nodes"),
        (b"PK\x03\x04 no graph at all", "truncated, or not ONNX"),
    ):
        path.write_bytes(content)
        refused_read(path, word)


def test_no_truncation_is_taken_for_a_graph(tmp_path):
    data = by_hand(size=4).SerializeToString()
    path = tmp_path / "cut.onnx"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        refused(partial(read_graph, path), 3)
    path.write_bytes(data)
    read_graph(path)


@pytest.mark.parametrize(
    ("versions", "word"), [({"opset": 999}, "opset 999 is newer than"), ({"ir_version": 99}, "ir_version 99 is newer")]
)
def test_versions_of_the_future_are_named(tmp_path, versions, word):
    path = tmp_path / "new.onnx"
    path.write_bytes(by_hand(**versions).SerializeToString())
    refused_read(path, word)


def test_a_graph_that_onnx_does_not_accept(tmp_path):
    proto = by_hand()
    proto.graph.node[0].input[1] = "nobody"
    path = tmp_path / "bad.onnx"
    path.write_bytes(proto.SerializeToString())
    refused_read(path, "not a valid ONNX graph")
