"""Counts the codes that differ between Ascend's and ONNX's order of rounding, and measures the effect on the output.

    python -m bench.bench_orders [--prompts 2]

Octavo's layers, as Ascend's operators, compute round(x / scale + zero_point). ONNX's QuantizeLinear computes
round(x / scale) + zero_point. For each dtype, the codes of the float model's layer inputs are computed in both orders,
and the bundled pipeline's transformer, with static ranges, runs in both orders.
"""

import argparse
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from octavo.calibrate.calibration import calibrate
from octavo.calibrate.layers.install import quantized
from octavo.calibrate.layers.modules import QuantizedLayer
from octavo.calibrate.replay.hooks import hooked, input_of
from octavo.calibrate.replay.sqnr import Power, outputs
from octavo.calibrate.settings import Settings
from octavo.pipelines.load import load_pipeline, model_directory
from octavo.pipelines.sd3 import SD3
from octavo.prompts import read_prompts

from .accuracy import recorded


class Tally:
    """Counts the codes of one layer's input and those that differ between both orders; keeps the largest difference."""

    def __init__(self, layer: QuantizedLayer) -> None:
        self.layer, self.codes, self.differing, self.largest = layer, 0, 0, 0

    def add(self, x: Tensor) -> None:
        """Adds the codes of an input of the layer."""
        scale, zero_point = self.layer.input_scale, self.layer.input_zero_point
        device = self.layer.input.codes(self.layer.transformed(x, -1)).q
        onnx = ((self.layer.transformed(x, -1).float() / scale).round() + zero_point).clamp(-128, 127)
        difference = (device - onnx).abs()
        self.codes += difference.numel()
        self.differing += int((difference > 0).sum())
        self.largest = max(self.largest, int(difference.max()))


class RoundedFirst(nn.Module):
    """An integer linear layer with a static range that rounds before it adds the zero point, as ONNX does."""

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        self.layer, self.input_type, self.noise_level = layer, layer.input_type, None

    def forward(self, input: Tensor) -> Tensor:
        layer = self.layer
        x = layer.transformed(input, -1).float()
        q = ((x / layer.input_scale).round() + layer.input_zero_point).clamp(-128, 127)
        total = q.double() @ layer.weight.double().T + layer.quant_bias
        return (total.float() * layer.deq).to(input.dtype)


def tallies(model: nn.Module, layers: Mapping[str, QuantizedLayer], calls: Any) -> list[Tally]:
    """Runs the float model on the calls, and counts the codes of every layer's input."""
    counts = {name: Tally(layer) for name, layer in layers.items()}
    hooks = {name: lambda module, args, kwargs, n=name: counts[n].add(input_of(args, kwargs)) for name in layers}
    with hooked(model, hooks):
        outputs(model, calls)
    return list(counts.values())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=2)
    options = parser.parse_args()
    print("| dtype | codes | codes that differ | largest difference | SQNR | in ONNX's order | between both orders |")
    print("|---|---|---|---|---|---|---|")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        pipe = load_pipeline(model_directory("demo"))
        model = pipe.transformer.requires_grad_(False)
        calls = recorded(pipe, list(read_prompts("demo").texts[: options.prompts]), 28)
        settings = Settings(defaults=SD3.keep_float, groups=SD3.groups, smoothing=True, sqnr_calls=0)
        model = model.to(dtype)
        calls = cast(calls, dtype)
        layers = calibrate(model, lambda calls=calls: calls, settings).layers
        layers = {name: layer for name, layer in layers.items() if layer.weight.ndim == 2}
        counted = tallies(model, layers, calls)
        exact = outputs(model, calls)
        with quantized(model, layers):
            device = outputs(model, calls)
        with quantized(model, {name: RoundedFirst(layer) for name, layer in layers.items()}):  # type: ignore[misc]
            onnx = outputs(model, calls)
        powers = [sqnr(exact, device), sqnr(exact, onnx), sqnr(device, onnx)]
        print(
            f"| {str(dtype).removeprefix('torch.')} | {sum(tally.codes for tally in counted)} "
            f"| {sum(tally.differing for tally in counted)} | {max(tally.largest for tally in counted)} "
            f"| {' | '.join(f'{power:.2f} dB' for power in powers)} |", flush=True,
        )  # fmt: skip


def cast(calls: Any, dtype: torch.dtype) -> list[Any]:
    """Returns the calls with their float arguments in `dtype`, except for the timestep."""
    return [
        call._replace(
            kwargs={
                name: value.to(dtype) if isinstance(value, Tensor) and value.ndim > 1 else value
                for name, value in call.kwargs.items()
            }
        )
        for call in calls
    ]


def sqnr(exact: list[list[Tensor]], approximate: list[list[Tensor]]) -> float:
    """Computes the SQNR in dB of the outputs `approximate` against `exact`; infinite if they are equal."""
    power = Power()
    for one, other in zip(exact, approximate, strict=True):
        power.add(one[0], other[0])
    return float("inf") if power.sqnr is None else power.sqnr


if __name__ == "__main__":
    main()
