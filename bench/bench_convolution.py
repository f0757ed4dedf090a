"""Measures the milliseconds of Octavo's reference convolutions of integers and of the same convolutions in float.

    OMP_NUM_THREADS=1 python -m bench.bench_convolution [--rounds 15]

"float64" is the convolution of the same codes in float64, which is exact too. The runs alternate. The shortest
processor time of each counts, because other processes affect it least.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from octavo.calibrate.layers.products import integer_convolution

# batch, channels in and out, height and width, kernel, groups, stride
SHAPES = {
    "3x3, 64 channels, 32 x 32": (2, 64, 64, 32, 3, 1, 1),
    "3x3, 256 channels, 16 x 16": (2, 256, 256, 16, 3, 1, 1),
    "1x1, 64 to 256 channels, 32 x 32": (2, 64, 256, 32, 1, 1, 1),
    "1x1, stride 2, 256 to 512 channels, 28 x 28": (1, 256, 512, 28, 1, 1, 2),
    "depthwise 3x3, 256 channels, 32 x 32": (2, 256, 256, 32, 3, 256, 1),
    "3x3 in 32 groups, 256 channels, 16 x 16": (2, 256, 256, 16, 3, 32, 1),
    "3x3, stride 2, 64 to 128 channels, 56 x 56": (1, 64, 128, 56, 3, 1, 2),
    "7x7, stride 2, 3 to 64 channels, 224 x 224": (1, 3, 64, 224, 7, 1, 2),
}


def milliseconds(run: Callable[[], object]) -> float:
    began = time.process_time()
    run()
    return (time.process_time() - began) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    print("| convolution | float | reference | of float | float64 |\n|---|---|---|---|---|")
    for name, (batch, channels, outputs, side, kernel, groups, stride) in SHAPES.items():
        q = torch.randint(-128, 128, (batch, channels, side, side)).float()
        weight = torch.randint(-127, 128, (outputs, channels // groups, kernel, kernel), dtype=torch.int8)
        floats, moves = weight.float(), ((stride, stride), (1, 1), groups)
        runs: list[Callable[[], object]] = [
            lambda q=q, w=floats, s=stride, g=groups: F.conv2d(q, w, None, s, 0, 1, g),
            lambda q=q, w=weight, m=moves: integer_convolution(q, w, *m),
            lambda q=q, w=weight, s=stride, g=groups: F.conv2d(q.double(), w.double(), None, s, 0, 1, g).int(),
        ]
        times = [[milliseconds(run) for run in runs] for _ in range(rounds + 1)][1:]
        exact, reference, double = (min(column) for column in zip(*times, strict=True))
        print(f"| {name} | {exact:.2f} | {reference:.2f} | {reference / exact:.2f} x | {double:.2f} |", flush=True)


if __name__ == "__main__":
    main()
