"""Compares calibration methods on random SD3 transformers: output SQNR on held-out calls, and cost.

    python -m bench.bench_networks [--seeds 0 1 2] [--calls 16] [--head 64]
    python -m bench.bench_networks --msmodelslim       in an environment of its own, with msmodelslim installed

The networks are r, with torch's default initialisation, and a, with the adaLN modulation multiplied by 8. With o, eight
input channels of each attention and feed-forward are multiplied by 50, and the weights behind them are divided by 50,
so that the float output stays the same. All methods quantize the layers that Octavo quantizes in SD3 by default.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from fnmatch import fnmatch
from typing import Any, NamedTuple

import torch
from torch import nn

from octavo.pipelines.sd3 import SD3
from tests.zoo.random_sd3 import put_outliers, random_calls, random_sd3

# the networks: factor of the adaLN modulation, and whether outliers are added
CELLS = {"r": (1.0, False), "r o": (1.0, True), "a": (8.0, False), "a o": (8.0, True)}


def network(cell: str, seed: int, head: int = 32) -> nn.Module:
    modulation, outliers = CELLS[cell]
    model = random_sd3(seed, modulation, head=head).requires_grad_(False)
    if outliers:
        put_outliers(model, seed + 100)
    return model


def decibels(exact: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    signal = sum(float(y.double().square().sum()) for y in exact)
    noise = sum(float((z.double() - y).square().sum()) for y, z in zip(exact, other, strict=True))
    return 10 * math.log10(signal / noise)


def outputs(model: nn.Module, calls: list[Any]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(**call.kwargs)[0] for call in calls]


class Outcome(NamedTuple):
    """The seconds that quantizing took, and the outputs of the quantized model on the held-out calls."""

    seconds: float
    outputs: list[torch.Tensor]


def octavo(settings: dict[str, Any]) -> Callable[[nn.Module, list[Any], list[Any]], Outcome]:
    from octavo.calibrate.calibration import calibrate
    from octavo.calibrate.layers.install import quantized
    from octavo.calibrate.settings import Settings

    def work(model: nn.Module, calls: list[Any], held_out_calls: list[Any]) -> Outcome:
        start = time.perf_counter()
        result = calibrate(model, lambda: calls, Settings(groups=SD3.groups, **settings))
        seconds = time.perf_counter() - start
        with quantized(model, result.layers):
            return Outcome(seconds, outputs(model, held_out_calls))

    return work


def msmodelslim(model: nn.Module, calls: list[Any], held_out_calls: list[Any]) -> Outcome:
    from msmodelslim.pytorch.quant.ptq_tools import Calibrator, QuantConfig

    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    float_layers = [name for name in names if any(fnmatch(name, pattern) for pattern in SD3.keep_float or ())]
    config = QuantConfig(
        w_bit=8, a_bit=8, w_signed=True, a_signed=True, w_sym=True, a_sym=False, act_quant=True, act_method=1,
        quant_mode=1, disable_names=float_layers, amp_num=0, keep_acc=None, sigma=25, device="cpu",
    )  # fmt: skip
    start = time.perf_counter()
    calibrator = Calibrator(model, config, [dict(call.kwargs) for call in calls])
    calibrator.run()
    return Outcome(time.perf_counter() - start, outputs(calibrator.model, held_out_calls))


def methods(peer: bool) -> dict[str, Any]:
    if peer:
        return {"msModelSlim": msmodelslim}
    from octavo.calibrate.settings import RECIPES

    rows: dict[str, dict[str, Any]] = {
        "static min-max": {},
        "dynamic per token": {"activations": "dynamic"},
        **{f"--accuracy {name}": recipe for name, recipe in RECIPES.items() if name != "plain"},
    }
    return {name: octavo({"defaults": SD3.keep_float, **settings}) for name, settings in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", nargs="*")
    parser.add_argument("--calls", type=int, default=16)
    parser.add_argument(
        "--head", type=int, default=32, help="width of each of the 8 heads; the network is 8 times as wide"
    )
    parser.add_argument("--msmodelslim", action="store_true")
    options = parser.parse_args()
    print(f"{options.calls} calibration calls, 12 held-out calls, median of {len(options.seeds)} seeds\n")
    print(f"| method | {' | '.join(CELLS)} | plain forwards a call |\n|---|{'---|' * (len(CELLS) + 1)}")
    calls, held_out_calls = random_calls(options.calls, 5), random_calls(12, 6)
    for name, method in methods(options.msmodelslim).items():
        if options.rows and name not in options.rows:
            continue
        cells, costs = [], []
        for cell in CELLS:
            sqnrs = []
            for seed in options.seeds:
                model = network(cell, seed, options.head)
                began = time.perf_counter()
                outputs(model, calls)
                middle = time.perf_counter()
                exact = outputs(model, held_out_calls)
                outcome = method(model, calls, held_out_calls)
                sqnrs.append(decibels(exact, outcome.outputs))
                costs.append(outcome.seconds / (middle - began))
            cells.append(f"{statistics.median(sqnrs):.1f}")
        print(f"| {name} | {' | '.join(cells)} | {statistics.median(costs):.2f} x |", flush=True)


if __name__ == "__main__":
    main()
