"""Measures the cost of observers on the bundled pipeline: replays the calls of one prompt with and without them.

python -m bench.bench_replay [--rounds 7] [--observer sigma]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

from octavo.calibrate.observers.observers import OBSERVERS, Options
from octavo.calibrate.plan import make_plan
from octavo.calibrate.replay.calls import evaluating, run
from octavo.calibrate.replay.hooks import observe
from octavo.capture.recorder import Memory, Recorder
from octavo.pipelines.load import load_pipeline, model_directory
from octavo.pipelines.sd3 import SD3
from octavo.prompts import read_prompts


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--observer", choices=list(OBSERVERS), action="append")
    options = parser.parse_args()
    pipe = load_pipeline(model_directory("demo"))
    model, memory = pipe.transformer.requires_grad_(False), Memory()
    with Recorder(model, memory):
        pipe(read_prompts("demo").texts[0], num_inference_steps=28, output_type="latent")
    plan = make_plan(model, defaults=SD3.keep_float)

    def plain() -> None:
        with evaluating(model):
            for position, call in enumerate(memory.calls):
                run(model, call, position)

    plain()
    print("| observer | time with : without observers, bundled pipeline, 28 calls | range over rounds |\n|---|---|---|")
    for name in options.observer or OBSERVERS:
        observer, ratios = OBSERVERS[name], []
        for _ in range(options.rounds):
            before = seconds(plain)
            observers = {layer: observer(Options(25.0, 99.99)) for layer in plan.quantized}
            ratios.append(seconds(partial(observe, model, observers, memory.calls)) / before)
        print(f"| {name} | {statistics.median(ratios):.2f} x | {min(ratios):.2f} to {max(ratios):.2f} |")


if __name__ == "__main__":
    main()
