"""Takes a pipeline the whole way: run, capture, replay, calibrate, export, read back, run in integers."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from octavo.calibrate.calibration import calibrate
from octavo.calibrate.formats.ascend.read import load_ascend
from octavo.calibrate.formats.export import export
from octavo.calibrate.layers.install import quantized
from octavo.calibrate.layers.modules import QuantizedLayer
from octavo.calibrate.replay.sqnr import Power, tensors_in
from octavo.calibrate.report import NEVER_RAN
from octavo.calibrate.result import Result
from octavo.calibrate.settings import Settings
from octavo.capture.recorder import Clock, Recorder, copied
from octavo.capture.store.reader import Capture
from octavo.capture.store.writer import CaptureWriter
from octavo.pipelines import family_of
from octavo.pipelines.denoisers import denoisers

Run = Callable[[Any, dict[str, Any]], Tensor]


@dataclass
class WalkResult:
    """Results for one denoiser.

    `exact`: replaying its stored calls gave the recorded outputs bit for bit. `same`: the layers that were read back
    gave the outputs of the layers that were written. `sqnr` is the SQNR in dB of the denoiser's output, `final` the
    SQNR of the pipeline's.
    """

    pipeline: str
    component: str
    kind: str
    calls: int
    exact: bool
    quantized: int
    kept_float: int
    sqnr: float | None
    same: bool
    final: float | None = None
    remarks: tuple[str, ...] = ()


def walk(pipe: Any, arguments: dict[str, Any], run: Run, directory: Path, **settings: Any) -> list[WalkResult]:
    """Takes `pipe` the whole way and returns a result for each denoiser. `run(pipe, arguments)` returns the pipeline's
    output.

    Raises AssertionError if capturing changes that output, or if an output is not finite.
    """
    family, modules = family_of(type(pipe).__name__), denoisers(pipe)
    for module in modules.values():
        module.requires_grad_(False)
    expected = run(pipe, arguments)
    assert bool(expected.isfinite().all()), "the pipeline makes values that are not finite"
    with recording(modules, directory / "captured") as (recorders, outputs):
        output = run(pipe, arguments)
    assert torch.equal(output, expected), "recording changed what the pipeline makes"
    capture = Capture.open(directory / "captured")
    family_settings = {"defaults": family.keep_float, "more_float": family.more_float, "groups": family.groups}
    chosen = Settings(sqnr_calls=4, **family_settings, **settings)
    rows, layers = [], {}
    for name, module in modules.items():
        calls = list(capture.calls(name))
        assert len(calls) == len(outputs[name])
        if not calls:
            continue
        exact = all(_same(_output(module, call), out) for call, out in zip(calls, outputs[name], strict=True))
        result = calibrate(module, lambda calls=calls: calls, chosen)
        export(result, module, directory / name)
        layers[name] = load_ascend(directory / name)
        same = _both(module, calls, result.layers, layers[name])
        rows.append(_row(pipe, name, module, result, exact, same, recorders[name]))
    with ExitStack() as stack:
        for name, integer_layers in layers.items():
            stack.enter_context(quantized(modules[name], integer_layers))
        quantized_output = run(pipe, arguments)
    assert bool(quantized_output.isfinite().all()), "the quantized pipeline makes values that are not finite"
    power = Power()
    power.add(expected, quantized_output)
    for row in rows:
        row.final = power.sqnr
    return rows


@contextmanager
def recording(
    modules: dict[str, nn.Module], directory: Path
) -> Iterator[tuple[dict[str, Recorder], dict[str, list[Any]]]]:
    """Records the calls of `modules` in a capture of one unit while the block runs, and yields the recorders and the
    outputs."""
    outputs: dict[str, list[Any]] = {name: [] for name in modules}
    recorders, clock = {}, Clock()
    with CaptureWriter.create(directory, {"prompts": 1}) as writer:
        with writer.unit(0, {"prompt": ""}) as unit, ExitStack() as stack:
            for name, module in modules.items():
                recorders[name] = stack.enter_context(Recorder(module, unit, name=name, clock=clock))
                keep = lambda module, args, out, records=outputs[name]: records.append(copied(tensors_in(out)))  # noqa: E731
                stack.callback(module.register_forward_hook(keep).remove)
            yield recorders, outputs
        writer.complete()


def _output(module: nn.Module, call: Any) -> list[Tensor]:
    with torch.no_grad():
        return tensors_in(module(*copied(call.args), **copied(call.kwargs)))


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _both(
    module: nn.Module, calls: list[Any], written: dict[str, QuantizedLayer], read: dict[str, QuantizedLayer]
) -> bool:
    """Returns whether the layers that were written and those that were read back give the same outputs."""
    outputs = []
    for layers in (written, read):
        with quantized(module, layers):
            outputs.append([_output(module, call) for call in calls])
    return all(map(_same, *outputs))


def _row(
    pipe: Any, name: str, module: nn.Module, result: Result, exact: bool, same: bool, recorder: Recorder
) -> WalkResult:
    totals = result.report["totals"]
    remarks = [] if exact else ["replay differs"]
    remarks += [f"{recorder.swapped} attention processors swapped"] if recorder.swapped else []
    never = sum(entry.reason == NEVER_RAN for entry in result.plan.entries)
    remarks += [f"{never} layers never called"] if never else []
    return WalkResult(
        type(pipe).__name__, name, type(module).__name__, recorder.call_count, exact, totals["quantized"],
        totals["kept_float"], totals["output_sqnr"], same, remarks=tuple(remarks),
    )  # fmt: skip
