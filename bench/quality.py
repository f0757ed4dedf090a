"""Compares a checkpoint of the bundled pipeline with the float model, by SQNR and by pictures.

    python -m bench.quality CHECKPOINT [--pictures 200] [--calls 8] [--sheet pictures.png]

SQNR is 10 log10(sum y^2 / sum (y - y_q)^2), over the transformer's outputs in all calls of held-out prompts, with the
same inputs for both models. Both models also draw the same prompts with the same noise, and a judge checks whether the
pictures show what the prompts say.
"""

import argparse
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from octavo.calibrate.formats.ascend.read import load_ascend
from octavo.calibrate.layers.install import quantized
from octavo.pipelines.demo.judge import score
from octavo.pipelines.demo.scene import parse
from octavo.pipelines.load import load_pipeline, model_directory
from octavo.prompts import read_prompts
from tests.zoo.drawing import draw, held_out_sqnr


def sheet(prompts: list[str], pairs: Iterator[tuple[np.ndarray, np.ndarray]], columns: int = 4) -> Image.Image:
    """Makes a contact sheet with the float and the quantized picture of each prompt side by side."""
    cell, text = 128, 34
    rows = -(-len(prompts) // columns)
    page = Image.new("RGB", (columns * (2 * cell + 24) + 8, rows * (cell + text + 14) + 8), "white")
    pen = ImageDraw.Draw(page)
    for number, (prompt, pair) in enumerate(zip(prompts, pairs, strict=True)):
        x = 8 + number % columns * (2 * cell + 24)
        y = 8 + number // columns * (cell + text + 14)
        for side, picture in enumerate(pair):
            page.paste(
                Image.fromarray(picture).resize((cell, cell), Image.Resampling.NEAREST), (x + side * (cell + 4), y)
            )
        words = prompt.split(" on a")
        pen.text((x, y + cell + 3), f"float | int8: {words[0]}", fill="black")
        pen.text((x, y + cell + 17), " on a".join(["", *words[1:]]).strip(), fill="black")
    return page


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--calls", type=int, default=8, help="held-out prompts whose calls are compared")
    parser.add_argument("--sheet", type=Path)
    options = parser.parse_args()
    pipe = load_pipeline(model_directory("demo"))
    layers = load_ascend(options.checkpoint)
    prompts = list(read_prompts("demo-heldout").texts)
    scenes = [parse(prompt) for prompt in prompts]
    sqnr = held_out_sqnr(pipe, layers, prompts[-options.calls :])
    count = options.pictures
    drawn, seconds = {}, {}
    for name, context in (("float", nullcontext()), ("int8", quantized(pipe.transformer, layers))):
        began = time.perf_counter()
        with context:
            drawn[name] = draw(pipe, prompts[:count])
        seconds[name] = (time.perf_counter() - began) / count
    scores = {name: score(pictures, scenes[:count]) for name, pictures in drawn.items()}
    print(f"SQNR of the transformer's output over {28 * options.calls} held-out calls: {sqnr:.1f} dB (bar: 25 dB)\n")
    parts = ("all", "shapes", "colours", "relation", "background")
    print(f"| {count} held-out prompts | {' | '.join(parts)} |", "|---" * (1 + len(parts)) + "|", sep="\n")
    for name, shares in scores.items():
        cells = (f"{shares[part]:.1%}" for part in parts)
        print(f"| {name} | {' | '.join(cells)} |")
    error = np.mean([np.square(a.astype(float) - b).mean() for a, b in zip(drawn["float"], drawn["int8"], strict=True)])
    print(f"\nPSNR of the int8 pictures against the float ones: {10 * math.log10(255**2 / max(error, 1e-9)):.1f} dB")
    print(
        "seconds per picture, in batches of 8: " + ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())
    )
    if options.sheet:
        shown = min(16, count)
        pairs = zip(drawn["float"][:shown], drawn["int8"][:shown], strict=True)
        sheet(prompts[:shown], pairs).save(options.sheet)
        print(f"{options.sheet}: {shown} prompts, float beside int8")


if __name__ == "__main__":
    main()
