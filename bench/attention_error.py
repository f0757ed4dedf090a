"""Measures what attention in integers costs in accuracy on the bundled pipeline, with or without added outliers.

    python -m bench.attention_error [--outliers] [--rows float fast balanced] [--prompts 8] [--held 4] [--pictures 200]

Each row has the SQNR in dB of the transformer's output over all calls of held-out prompts, against the float model with
torch's attention, and the share of pictures that show what the prompt says. Both are measured twice: with torch's
attention, and with attention in integers.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from octavo.calibrate.calibration import calibrate
from octavo.calibrate.layers.install import quantized
from octavo.calibrate.runtime import optimized
from octavo.calibrate.runtime.operators import attend
from octavo.calibrate.settings import RECIPES, Settings
from octavo.pipelines.demo.judge import score
from octavo.pipelines.demo.scene import parse
from octavo.pipelines.sd3 import SD3
from octavo.prompts import read_prompts
from tests.zoo.drawing import draw

from .accuracy import demo_pipeline, recorded, sqnr

WORDS = ("torch", "integers")  # kernels of attention, as `accelerate` names them


@contextmanager
def attending(model: nn.Module, word: str) -> Iterator[None]:
    """Makes forwards of `model` compute attention as `word` says, inside `with`."""
    attend(model, word)
    try:
        yield
    finally:
        attend(model, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=["float", "fast", "balanced"], help="float, or a recipe")
    parser.add_argument("--outliers", action="store_true")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--held", type=int, default=4)
    parser.add_argument("--pictures", type=int, default=0)
    options = parser.parse_args()
    pipe = demo_pipeline(outliers=options.outliers)
    model = pipe.transformer
    held_out = list(read_prompts("demo-heldout").texts)
    held_out_calls = recorded(pipe, held_out[-options.held :])
    scenes = [parse(prompt) for prompt in held_out[: options.pictures]]
    calls = recorded(pipe, list(read_prompts("demo").texts[: options.prompts])) if options.rows != ["float"] else []
    print("| layers | SQNR: torch | integers | pictures: torch | integers |\n|---|---|---|---|---|")
    for name in options.rows:
        layers: Any = {}
        if name != "float":
            settings = Settings(defaults=SD3.keep_float, groups=SD3.groups, sqnr_calls=0, **RECIPES[name])
            layers = calibrate(model, lambda: calls, settings).layers
        cells = [f"{sqnr(model, layers, held_out_calls, attending(model, word)):.2f} dB" for word in WORDS]
        for word in WORDS if scenes else ():
            fast = {layer: optimized(module) for layer, module in layers.items()}
            with quantized(model, fast), attending(model, word):
                cells.append(f"{score(draw(pipe, held_out[: options.pictures]), scenes)['all']:.1%}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
