"""Compares the chosen attention with torch's on a CPU: milliseconds of alternating calls, and errors against float64.

OMP_NUM_THREADS=2 python -m bench.bench_attention [--rounds 7] [--processor]

Inputs are normal random numbers; the queries are multiplied by the number in the column `queries`. An error is the
norm of the difference to the output in float64, divided by the norm of that output. Where torch's own attention is
chosen, both columns are of one function. With --processor, times are
processor times and the smallest of all rounds, for a machine that other processes use too.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from octavo.calibrate.runtime.choice import attention_for, size_class
from octavo.calibrate.runtime.operators import attended
from octavo.capture.tensors import dtype_name

CASES = [  # heads, rows, keys, width
    (24, 1357, 1357, 64),
    (24, 1101, 1101, 64),
    (24, 4429, 4429, 64),
    (24, 1357, 1357, 128),
    (8, 4096, 77, 40),
    (24, 256, 256, 64),
]
ERRORS_UP_TO = 2000  # most rows of a case whose errors are measured, because attention in float64 is slow
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def make_inputs(case: tuple[int, int, int, int], queries: float, dtype: torch.dtype) -> list[Tensor]:
    """Makes queries, keys and values in the memory layout of models: one token after the other, with all its heads."""
    heads, rows, keys, width = case
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, count, heads, width, generator=generator) for count in (rows, keys, keys)]
    tensors[0] *= queries
    return [tensor.to(dtype).transpose(1, 2) for tensor in tensors]


def measure(functions: dict[str, Function], inputs: list[Tensor], rounds: int, processor: bool) -> list[float]:
    """Measures the milliseconds of one call of each function, after one warm-up call."""
    clock = time.process_time if processor else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_index in range(rounds + 1):
        for name, function in functions.items():
            start = clock()
            function(*inputs)
            if round_index:
                times[name].append(1000 * (clock() - start))
    return [min(values) if processor else statistics.median(values) for values in times.values()]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--processor", action="store_true")
    options = parser.parse_args()
    functions: dict[str, Function] = {"torch": F.scaled_dot_product_attention, "octavo": attended}
    print(
        "| heads, rows, keys, width | queries | dtype | torch | Octavo | | choice | error: torch | Octavo |\n"
        + "|---" * 9
        + "|"
    )
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for case in CASES:
            for queries in (1.0, 3.0, 10.0) if case == CASES[0] else (1.0,):
                inputs = make_inputs(case, queries, dtype)
                old, new = measure(functions, inputs, options.rounds, options.processor)
                cells = f"{old:.1f} ms | {new:.1f} ms | {old / new:.2f} x"
                errors = ["", ""]
                if case[1] <= ERRORS_UP_TO:
                    exact = functions["torch"](*[x.double() for x in inputs])
                    results = [function(*inputs).double() for function in functions.values()]
                    errors = [f"{float((result - exact).norm() / exact.norm()):.2g}" for result in results]
                choice = attention_for(dtype, size_class(case[1] * case[2]), "auto")
                name = dtype_name(dtype)
                print(f"| {case} | {queries:g} | {name} | {cells} | {choice} | {' | '.join(errors)} |", flush=True)


if __name__ == "__main__":
    main()
