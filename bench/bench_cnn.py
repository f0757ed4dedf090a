"""Measures integer ResNets: the bundled one on held-out digits, ResNet-18 and 50 with msModelSlim's documented calls.

    python -m bench.bench_cnn [--pictures 128] [--snippets 18 50]

The calibration pictures are from the training split. Logits are compared on the 450 held-out digits, with the same
inputs for the float and the integer model.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from octavo import Calibrator, QuantConfig
from octavo.calibrate.preparation.batch_norms import fold_norms
from octavo.calibrate.preparation.synthetic_inputs import synthetic_calls
from octavo.calibrate.replay.user_data import Sample
from octavo.calibrate.settings import RECIPES, Settings
from tests.zoo.digits import bundled, measured, quality
from tests.zoo.resnet import resnet18, resnet50

SHAPE = [1, 3, 32, 32]


def snippet(model: nn.Module) -> dict[str, Any]:
    """Calibrates a model without data, with the options of msModelSlim's documentation; returns the report."""
    keep_acc = {"admm": [False, 1000], "easy_quant": [False, 1000], "round_opt": False}
    config = QuantConfig(disable_names=[], amp_num=0, input_shape=[1, 3, 224, 224], keep_acc=keep_acc, sigma=25)
    calibrator = Calibrator(model.eval(), config)
    calibrator.run()
    return calibrator.result.report


def print_digits(pictures: int) -> None:
    """Prints a row for each way to calibrate the bundled ResNet."""
    data = bundled()
    free = synthetic_calls(data.model, SHAPE)
    samples = [Sample((x,), {}) for x in data.training[:pictures].split(16)]
    noise = [Sample((torch.rand(32, *SHAPE[1:], generator=torch.Generator().manual_seed(0)),), {})]
    exact = quality(data.exact, data.exact, data.labels)
    print("| calibrated with | top-1 | arg-max as float | SQNR of logits |\n|---|---|---|---|")
    print(f"| float | {exact.accuracy:.2%} | | |", flush=True)
    rows = [(f"{pictures} pictures, --accuracy {name}", samples, recipe) for name, recipe in RECIPES.items()]
    rows += [(f"no data, --accuracy {name}", free, RECIPES[name]) for name in ("plain", "balanced")]
    rows += [("no data, uniform numbers, as without batch norms", noise, {})]
    for name, calls, recipe in rows:
        result = measured(data, calls, Settings(**recipe))
        print(f"| {name} | {result.accuracy:.2%} | {result.agreement:.2%} | {result.sqnr:.1f} dB |", flush=True)


def print_snippets(names: list[str]) -> None:
    """Prints a row for each of the named ResNets, with random weights."""
    if not names:
        return
    makers: dict[str, Callable[[], nn.Module]] = {"18": resnet18, "50": resnet50}
    columns = ("network", "layers", "float", "folding changes the output by", "output SQNR", "seconds")
    print("\n|", " | ".join(columns), "|\n" + "|---" * len(columns) + "|")
    for name in names:
        torch.manual_seed(0)
        model = makers[name]().eval()
        x = torch.randn(1, 3, 224, 224)
        with torch.no_grad():
            before = model(x)
            change = float((fold_norms(model, Sample((x,), {})).model(x) - before).norm() / before.norm())
        began = time.monotonic()
        totals = snippet(model)["totals"]
        print(
            f"| ResNet-{name} | {totals['quantized']} | {totals['kept_float']} | {change:.1e} | "
            f"{totals['output_sqnr']:.1f} dB | {time.monotonic() - began:.0f} |", flush=True,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pictures", type=int, default=128)
    parser.add_argument("--snippets", nargs="*", default=["18", "50"], choices=["18", "50"])
    options = parser.parse_args()
    print_digits(options.pictures)
    print_snippets(options.snippets)


if __name__ == "__main__":
    main()
