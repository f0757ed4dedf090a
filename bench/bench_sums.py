"""Compares the sums that GPTQ needs as products of integers (native/sums.c) and as torch's products of float32 numbers.

OMP_NUM_THREADS=1 python -m bench.bench_sums [--rounds 7]

Each row is one `Sums.add` for an input with one range: the quantization of the input and both products. Seconds are
those of the thread, medians of rounds in which integers and floats alternate. An error is the norm of the difference to
sums in float64, divided by the norm of these sums, for the first 256 rows of the matrix after one call.
"""

import argparse
import statistics
import time
from unittest import mock

import torch
from torch import Tensor, nn

from octavo.calibrate.choice import Choice
from octavo.calibrate.layers.inputs import StaticInput
from octavo.calibrate.layers.scheme import ACTIVATION, Range, qparams_of
from octavo.calibrate.native import kernels
from octavo.calibrate.replay.current_call import CurrentCall
from octavo.calibrate.rounding.sums import Sums

CASES = [(1536, 2), (1536, 4096), (6144, 4096)]  # columns, rows
CHECKED = 256  # rows of the matrices that are compared with float64


def add(sums: Sums, x: Tensor, integers: bool) -> float:
    """Adds the rows `x` to `sums`, with the compiled kernel if `integers`, and returns the seconds."""
    library = kernels.library()
    with mock.patch.object(kernels, "library", return_value=library if integers else None):
        start = time.thread_time()
        sums.add(x)
        return time.thread_time() - start


def errors(sums: Sums, x: Tensor, layer_input: StaticInput) -> list[float]:
    """Returns the relative errors of `gram` and `residual` after one call with the rows `x`."""
    assert sums.gram is not None
    assert sums.residual is not None
    assert sums.inputs is not None  # mirrors the gram matrix
    xq = layer_input.represented(x)
    first, others = xq[:, :CHECKED].double(), (xq, x - xq)
    exact = [torch.cat([first.T @ part.double() for part in other.split(CHECKED, 1)], 1) for other in others]
    found = [matrix[:CHECKED].double() for matrix in (sums.gram, sums.residual)]
    return [float((one - other).norm() / other.norm()) for one, other in zip(found, exact, strict=True)]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    assert kernels.library() is not None, kernels.absence()
    print(
        "| columns | rows | floats | integers | | error of gram: floats | integers | of residual: floats | integers |"
    )
    print("|---" * 9 + "|")
    for columns, rows in CASES:
        x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
        qparams = qparams_of(Range(float(x.min()), float(x.max())), ACTIVATION, torch.float32)
        assert qparams is not None
        layer_input, current = StaticInput(qparams), CurrentCall(nn.Linear(1, 1))
        kinds = {
            name: Sums(Choice(layer_input), current, columns, lambda x: x, True) for name in ("floats", "integers")
        }
        times: dict[str, list[float]] = {name: [] for name in kinds}
        found: dict[str, list[float]] = {}
        for _ in range(options.rounds + 1):
            for name, sums in kinds.items():
                times[name].append(add(sums, x, name == "integers"))
                if name not in found:
                    found[name] = errors(sums, x, layer_input)
        old, new = (statistics.median(values[1:]) for values in times.values())
        cells = [f"{found[name][index]:.1e}" for index in (0, 1) for name in kinds]
        print(
            f"| {columns} | {rows} | {old:.4g} s | {new:.4g} s | {old / new:.2f} x | {' | '.join(cells)} |", flush=True
        )


if __name__ == "__main__":
    main()
