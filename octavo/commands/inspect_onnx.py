"""Shows an ONNX graph: its layers, schemes and sizes, and which runtimes can load it."""

import os
from collections import Counter
from pathlib import Path

from octavo.calibrate.formats.manifest import manifests_of, verify
from octavo.calibrate.formats.onnx.check import layers_of, verdicts
from octavo.calibrate.formats.onnx.files import DATA
from octavo.calibrate.formats.onnx.packages import check_extra
from octavo.calibrate.formats.onnx.read import opset_of, read_graph
from octavo.capture.errors import OctavoError

from ..terminal import Terminal, size
from .inspect_checkpoint import verified_text


def inspect_onnx(path: Path, terminal: Terminal) -> bool:
    """Prints the contents of the ONNX graph at `path`. Returns whether the graph is sound: onnxruntime or Ascend's
    compiler can load it, its scales are positive and finite, its zero points are integers from -128 to 127, and its
    int32 sums cannot overflow.

    Raises FileError for a file that is damaged, or not safe to read.
    """
    check_extra(f"{path}")
    place = Path(os.path.realpath(path))
    try:
        verify(place.parent, {place.name, place.name + DATA})
        manifests = manifests_of(place.parent, place.name)
        graph = read_graph(path)
    except OctavoError:
        terminal.event("onnx", path=str(path), sound=False)
        raise
    proto, layers, results = graph.proto, layers_of(graph), verdicts(graph)
    schemes = Counter(layer.scheme for layer in layers)
    external = f", and {size(graph.external)} in its data file" if graph.external else ""
    terminal.say(f"{path}: an ONNX graph, {size(graph.size)}{external}")
    terminal.say(f"  opset     {opset_of(proto)}, ir_version {proto.ir_version}, {len(proto.graph.node)} nodes")
    terminal.say(f"  sha256    {graph.digest}")
    terminal.say(f"  files     {verified_text(manifests)}")
    for word, values in (("inputs", proto.graph.input), ("outputs", proto.graph.output)):
        terminal.say(f"  {word:<9} {', '.join(_name_and_shape(value) for value in values)}")
    terminal.say("  layers    " + ", ".join(f"{count} {scheme}" for scheme, count in schemes.most_common()))
    rows = [[x.name, x.operator, x.scheme, " x ".join(map(str, x.shape)), size(x.bytes)] for x in layers]
    terminal.table("", ["layer", "operator", "scheme", "weight", "size"], rows)
    for verdict in results:
        terminal.say(f"  {'yes' if verdict.ok else 'no ':<4}{verdict.consumer:<12} {verdict.subject}: {verdict.fact}")
    loads = {verdict.consumer: verdict.ok for verdict in results}
    sound = loads["octavo"] and (loads["onnxruntime"] or loads["Ascend"])
    terminal.event(
        "onnx", path=str(path), sound=sound, sha256=graph.digest, opset=opset_of(proto), ir_version=proto.ir_version,
        bytes=graph.size, external_bytes=graph.external, schemes=schemes, layers=[x._asdict() for x in layers],
        inputs=[_name_and_shape(x) for x in proto.graph.input],
        outputs=[_name_and_shape(x) for x in proto.graph.output],
        verdicts=[verdict._asdict() for verdict in results], verified=bool(manifests),
    )  # fmt: skip
    return sound


def _name_and_shape(value: object) -> str:
    """Returns a text of the name and the shape of an input or output of a graph, such as "input.1 (batch, 3, 224,
    224)"."""
    dims = value.type.tensor_type.shape.dim  # type: ignore[attr-defined]
    lengths = ", ".join(dim.dim_param or str(dim.dim_value) for dim in dims)
    return f"{value.name} ({lengths})"  # type: ignore[attr-defined]
