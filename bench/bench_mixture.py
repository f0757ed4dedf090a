"""Measures a mixture of schemes that a deployer wrote by hand against what a budget of its bytes and time chooses.

    python -m bench.bench_mixture [--outliers] [--element int8 fp8] [--prompts 8] [--held 6] [--runs 200]

The mixture by hand is that of vllm-omni issue 6789, made to fit a GPU of 32 GB: attention and modulation keep only
their weights in 8 bits, the first linear layer of a feed-forward (gate and up in other networks) has one range for its
input, the second one a scale for each token. `error` is the mean squared error of the final latents of held-out
prompts, relative to the mean square of the float latents.
"""

import argparse
from functools import partial
from typing import Any

from octavo.calibrate.calibration import calibrate
from octavo.calibrate.choose import choose
from octavo.calibrate.layers.schemes import NAMES
from octavo.calibrate.mixed_precision.budget import Cost, Search, summed
from octavo.calibrate.mixed_precision.sensitivity import Candidates, Runs, cost_of, float_cost
from octavo.calibrate.part import planned
from octavo.calibrate.replay.calls import evenly_spaced
from octavo.calibrate.replay.work import Work
from octavo.calibrate.settings import RECIPES, Settings
from octavo.pipelines.sd3 import SD3
from octavo.prompts import read_prompts

from .accuracy import demo_pipeline, recorded
from .bench_budget import latents


def by_hand(name: str, element: str) -> str:
    """Returns the scheme that the mixture by hand has for the layer `name` of an SD3 transformer."""
    ways = NAMES[element]
    if ".net.0." in name:
        return ways["static"]
    return ways["dynamic"] if ".net.2" in name else ways["float"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--outliers", action="store_true")
    parser.add_argument("--element", nargs="*", default=["int8", "fp8"], choices=["int8", "fp8"])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--held", type=int, default=6)
    parser.add_argument("--runs", type=int, default=200, help="most runs of the pipeline that a budget may use")
    options = parser.parse_args()
    pipe = demo_pipeline(outliers=options.outliers)
    model = pipe.transformer
    texts = list(read_prompts("demo").texts[: options.prompts])
    calls = recorded(pipe, texts)
    held_out = Runs(model, partial(latents, pipe, list(read_prompts("demo-heldout").texts[: options.held]), 28))
    print("| mixture | bytes | of float | time | schemes | error |\n|---|---|---|---|---|---|", flush=True)
    for element in options.element:
        _rows(element, pipe, calls, texts, held_out, options.runs)


def _rows(element: str, pipe: Any, calls: list[Any], texts: list[str], held_out: Runs, most: int) -> None:
    """Prints two rows for `element`: the mixture by hand, and the one that a budget of its bytes and estimated time
    chooses."""
    model = pipe.transformer
    settings = Settings(defaults=SD3.keep_float, groups=SD3.groups, element=element, **RECIPES["fast"])
    plan = planned(model, settings)
    candidates = Candidates(model, choose(model, lambda: calls, plan, settings, Work()).choices)
    if not held_out.macs:
        held_out.begin([entry.name for entry in plan.entries])
    before = float_cost(plan, held_out.macs)
    layers = candidates.layers({name: by_hand(name, element) for name in plan.quantized})
    used = summed(cost_of(layers.get(name), cost) for name, cost in before.items())
    _print(f"{element} by hand", used, summed(before.values()), layers, held_out)
    some = [texts[position] for position in evenly_spaced(len(texts), 2)]
    time = used.time / summed(before.values()).time
    limit = f"{used.bytes:.0f}B,{time + 5e-4:.3f}x"
    limited = Settings(defaults=SD3.keep_float, groups=SD3.groups, element=element, budget=limit, **RECIPES["fast"])
    result = calibrate(
        model, lambda: calls, limited, trajectory=partial(latents, pipe, some, 8), search=Search(runs=most)
    )
    chosen = summed(cost_of(result.layers.get(name), cost) for name, cost in before.items())
    _print(f"{element} by --budget", chosen, summed(before.values()), result.layers, held_out)


def _print(name: str, used: Cost, whole: Cost, layers: Any, held_out: Runs) -> None:
    counts: dict[str, int] = {}
    for layer in layers.values():
        counts[layer.scheme] = counts.get(layer.scheme, 0) + 1
    words = ", ".join(f"{count} {scheme}" for scheme, count in sorted(counts.items()))
    error = held_out.error(layers) / held_out.signal
    share, time = used.bytes / whole.bytes, used.time / whole.time
    print(f"| {name} | {used.bytes:.0f} | {share:.1%} | {time:.2f} x | {words} | {error:.3g} |", flush=True)


if __name__ == "__main__":
    main()
