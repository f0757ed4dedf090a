"""Compares ways to choose the scheme of each layer under a budget, by the error of the final latents.

    python -m bench.bench_budget [--outliers] [--accuracy fast] [--limits 0.35 0.5 0.7] [--held 6] [--check 12]

A limit is a share of the bytes of the float layers. At each limit, each of these ways chooses a scheme for every
layer, and the model then draws held-out prompts in 28 steps:
  output MSE     static or float: layers with the largest mean squared output error that fit stay float (like amp_num)
  MSE, knapsack  static or float: the least sum of mean squared output errors within the limit
  SQNR, knapsack the same, with each error divided by the power of the layer's output
  latents        static or float: the least sum of errors of the final latents, over 2 calibration prompts in 8 steps
  all            static, dynamic, weight-only or float, by the error of the final latents
  all, 0.75x     the same, and at most 0.75 of the estimated time of the float layers
`--check N` prints how well the sum of errors predicts the error of N random mixtures of schemes, and the rank
correlation (Spearman) between the errors of layers in 8 steps and in 28 steps.
"""

import argparse
import random
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from octavo.calibrate import choose
from octavo.calibrate.layers.schemes import STATIC
from octavo.calibrate.mixed_precision import knapsack
from octavo.calibrate.mixed_precision.budget import Cost, summed
from octavo.calibrate.mixed_precision.knapsack import cost_of_choice
from octavo.calibrate.mixed_precision.mix import estimated_error
from octavo.calibrate.mixed_precision.sensitivity import Candidates, LayerGroup, Runs, float_cost, measure_groups
from octavo.calibrate.plan import make_plan
from octavo.calibrate.replay.calls import evenly_spaced
from octavo.calibrate.replay.sqnr import Power, comparing, outputs
from octavo.calibrate.replay.work import Work
from octavo.calibrate.settings import DEFAULTS, RECIPES, Settings
from octavo.pipelines.run import prompt_seed
from octavo.pipelines.sd3 import SD3
from octavo.prompts import read_prompts

from .accuracy import demo_pipeline, recorded

SCHEMES = DEFAULTS.mixture  # W8A8, W8A8_DYNAMIC, W8A16


def latents(pipe: Any, prompts: list[str], steps: int) -> list[Tensor]:
    """Computes the final latents (prompts, C, H, W), with the guidance and noise of `octavo capture`."""
    noise = [torch.Generator().manual_seed(prompt_seed(text, 0)) for text in prompts]
    return [pipe(prompts, generator=noise, num_inference_steps=steps, output_type="latent").images]


def output_errors(candidates: Candidates, groups: Sequence[LayerGroup], calls: list[Any]) -> list[Power]:
    """Measures the error of the output of each layer with static inputs against its float output, over 32 calls."""
    makers = {group.names[0]: partial(_static, candidates, group.names[0]) for group in groups}
    with comparing(candidates.model, makers) as powers:
        outputs(candidates.model, [calls[position] for position in evenly_spaced(len(calls), 32)])
    return [powers[group.names[0]] for group in groups]


def largest_float(groups: Sequence[LayerGroup], powers: Sequence[Power], limit: Cost) -> list[int]:
    """Chooses for each layer 1 (static), or 0 (float) for the layers with the largest output errors that fit."""
    chosen = [1] * len(groups)
    for index in sorted(range(len(groups)), key=lambda index: -powers[index].mean_square):
        other = [*chosen[:index], 0, *chosen[index + 1 :]]
        if cost_of_choice([group.options for group in groups], other).within(limit):
            chosen = other
    return chosen


def _static(candidates: Candidates, name: str) -> Any:
    return candidates.layer(name, STATIC)


def assignment(groups: Sequence[LayerGroup], chosen: Sequence[int]) -> dict[str, str]:
    """Returns the scheme of each layer by layer name, given the number of the option of each group."""
    return {n: s for group, option in zip(groups, chosen, strict=True) for n, s in group.assignments[option].items()}


def spearman(one: list[float], other: list[float]) -> float:
    """Computes Spearman's rank correlation of two lists."""
    ranks = torch.stack([torch.tensor(values).argsort().argsort().double() for values in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])


def check(candidates: Candidates, groups: list[LayerGroup], runs: Runs, longer: Runs, count: int) -> None:
    """Prints how well the sum of errors predicts random mixtures, and how well 8 steps rank layers for 28 steps."""
    chance, pairs = random.Random(0), []
    for _ in range(count):
        share, able = chance.random(), chance.choice([(1,), (3,), (1, 2, 3)])
        chosen = [chance.choice(able) if chance.random() < share else 0 for _ in groups]
        estimate = sum(group.options[option].error for group, option in zip(groups, chosen, strict=True))
        pairs.append((estimate, runs.error(candidates.layers(assignment(groups, chosen)))))
    logs = torch.tensor(pairs).double().log().T
    ratios = sorted(true / estimate for estimate, true in pairs)
    print(
        f"{count} mixtures: log correlation {float(torch.corrcoef(logs)[0, 1]):.4f}, measured over estimated", end=" "
    )
    print(f"{ratios[0]:.2f} .. {ratios[len(ratios) // 2]:.2f} .. {ratios[-1]:.2f}", flush=True)
    many = [longer.error(candidates.layers(group.assignments[1])) for group in groups]
    print(f"ranks of static layers, 8 steps and 28: {spearman([g.options[1].error for g in groups], many):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--outliers", action="store_true")
    parser.add_argument("--accuracy", default="fast", choices=list(RECIPES))
    parser.add_argument("--limits", type=float, nargs="*", default=[0.35, 0.5, 0.7])
    parser.add_argument("--held", type=int, default=6)
    parser.add_argument("--check", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=8, help="prompts to calibrate with")
    options = parser.parse_args()
    pipe = demo_pipeline(outliers=options.outliers)
    model = pipe.transformer
    texts = list(read_prompts("demo").texts[: options.prompts])
    calls = recorded(pipe, texts)
    settings = Settings(defaults=SD3.keep_float, groups=SD3.groups, **RECIPES[options.accuracy])
    plan = make_plan(model, defaults=SD3.keep_float)
    choices = choose.choose(model, lambda: calls, plan, settings, Work()).choices
    candidates, names = Candidates(model, choices), [name for name in plan.quantized if name in choices]
    some = [texts[position] for position in evenly_spaced(len(texts), 2)]
    runs = Runs(model, partial(latents, pipe, some, 8))
    runs.begin([entry.name for entry in plan.entries])
    before, began = float_cost(plan, runs.macs), time.perf_counter()
    groups = measure_groups(candidates, [(name,) for name in names], SCHEMES, before, runs, Work())
    print(
        f"{len(groups)} layers, {runs.count} runs of 2 prompts in 8 steps: {time.perf_counter() - began:.0f} s",
        flush=True,
    )
    if options.check:
        longer = Runs(model, partial(latents, pipe, some, 28))
        longer.begin(names)
        check(candidates, groups, runs, longer, options.check)
    held_out_runs = Runs(model, partial(latents, pipe, list(read_prompts("demo-heldout").texts[: options.held]), 28))
    held_out_runs.begin([entry.name for entry in plan.entries])
    table(candidates, groups, before, calls, held_out_runs, options.limits)


def rankings(
    groups: list[LayerGroup], powers: list[Power], limit: Cost, limit_with_time: Cost
) -> dict[str, list[int] | None]:
    """Returns the options that each way chooses, None without a solution; `limit_with_time` limits the time too."""
    every = [group.options for group in groups]
    pairs = list(zip(every, powers, strict=True))
    by_mse = [(options[0], options[1]._replace(error=power.mean_square)) for options, power in pairs]
    by_sqnr = [(options[0], options[1]._replace(error=power.noise / power.signal)) for options, power in pairs]
    return {
        "output MSE": largest_float(groups, powers, limit),
        "MSE, knapsack": knapsack.choose(by_mse, limit),
        "SQNR, knapsack": knapsack.choose(by_sqnr, limit),
        "latents": knapsack.choose([options[:2] for options in every], limit),
        "all": knapsack.choose(every, limit),
        "all, 0.75x": knapsack.choose(every, limit_with_time),
    }


def table(
    candidates: Candidates,
    groups: list[LayerGroup],
    before: dict[str, Cost],
    calls: list[Any],
    held_out_runs: Runs,
    limits: list[float],
) -> None:
    """Prints a row for each limit and each way to choose, with the error on held-out prompts."""
    whole = summed(before.values())
    fixed = whole.minus(summed(before[group.names[0]] for group in groups))
    every = [group.options for group in groups]
    powers = output_errors(candidates, groups, calls)
    bytes_of_layers = f"{whole.bytes} bytes of layers, {fixed.bytes} stay float"
    print(f"float latents: mean square {held_out_runs.signal:.3f}; {bytes_of_layers}")
    print("| limit | ranked by | bytes | time | W8A8, dynamic, W8A16, float | error | of output MSE | estimated |")
    print("|---|---|---|---|---|---|---|---|")
    for limit in limits:
        bytes_limit = _limit(limit, None, whole).minus(fixed)
        limit_with_time = _limit(limit, 0.75, whole).minus(fixed)
        rows = rankings(groups, powers, bytes_limit, limit_with_time)
        base = 0.0
        for name, chosen in rows.items():
            if chosen is None:
                print(f"| {limit:.0%} | {name} | nothing keeps it |")
                continue
            error = held_out_runs.error(candidates.layers(assignment(groups, chosen)))
            base = base or error
            used = cost_of_choice(every, chosen).plus(fixed)
            cells = [f"{limit:.0%}", name, f"{used.bytes / whole.bytes:.1%}", f"{used.time / whole.time:.2f}x"]
            cells.append(", ".join(str(chosen.count(option)) for option in (1, 2, 3, 0)))
            cells += [f"{error:.3g}", f"{error / base:.2f}"]
            print(f"| {' | '.join(cells)} | {estimated_error(every, chosen):.3g} |", flush=True)


def _limit(share: float, time: float | None, whole: Cost) -> Cost:
    return Cost(share * whole.bytes, float("inf") if time is None else time * whole.time)


if __name__ == "__main__":
    main()
