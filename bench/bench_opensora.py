"""Compares the time of a small STDiT3's forward with the time of its linears and attentions alone.

    python -m bench.bench_opensora [--rounds 9] [--heads 4] [--dtype float32] [--threads N] [--clock wall|cpu]

Records every linear and attention call of one forward, and runs these calls again by themselves, on inputs of the same
shape and layout. Each round runs the forward, the linears and the attentions, so that a busy machine slows all three
and the ratio stays meaningful. With --threads 1 --clock cpu only the time of this process counts.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from octavo.pipelines.opensora import STDiT3

LATENTS = (15, 30, 53)  # frames, height, width in latent space, of 51 frames of 240 x 426 pixels
BAR = 1.3  # the ratio that the forward should not exceed


class Recorder(TorchFunctionMode):
    """Records every F.linear and attention call of its `with` block; calls of the same shapes share their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, list[Callable[[], torch.Tensor]]] = {F.linear: [], F.scaled_dot_product_attention: []}
        self._first: dict[Any, tuple] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in self.calls:
            key = (func, tuple((tuple(a.shape), a.stride()) for a in args if isinstance(a, torch.Tensor)))
            copies = self._first.setdefault(key, tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args))
            self.calls[func].append(partial(func, *copies, **kwargs))
        return func(*args, **kwargs)


def inputs(dtype: torch.dtype, frames_marked: bool) -> tuple[tuple, dict]:
    """Makes the arguments of a call with guidance: 240p, 51 frames, a caption of 60 tokens."""
    mask = (torch.arange(300) < 60).long()[None]
    kwargs: dict[str, Any] = {"mask": mask, "fps": torch.tensor([24.0])}
    kwargs |= {"height": torch.tensor([240.0]), "width": torch.tensor([426.0])}
    if frames_marked:
        kwargs["x_mask"] = torch.ones(2, LATENTS[0], dtype=torch.bool)
    args = (torch.randn(2, 4, *LATENTS, dtype=dtype), torch.full((2,), 500.0), torch.randn(2, 1, 300, 4096))
    return args, kwargs


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def seconds(run: Callable[[], Any], clock: Callable[[], float]) -> float:
    start = clock()
    run()
    return clock() - start


def measure(heads: int, rounds: int, dtype: torch.dtype, frames_marked: bool, clock: Callable[[], float]) -> None:
    torch.manual_seed(0)
    model = STDiT3(hidden_size=288, depth=4, num_heads=heads).to(dtype).eval()
    args, kwargs = inputs(dtype, frames_marked)
    with Recorder() as recorder:
        model(*args, **kwargs)
    parts = {"forward": lambda: model(*args, **kwargs)}
    names = {F.linear: "linears", F.scaled_dot_product_attention: "attentions"}
    for func, calls in recorder.calls.items():
        parts[names[func]] = lambda calls=calls: [call() for call in calls] and None
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(rounds):
        for name, run in parts.items():
            times[name].append(seconds(run, clock))
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows = zip(*times.values(), strict=True)
    ratios = sorted(forward / (linears + attentions) for forward, linears, attentions in rows)
    ratio = medians["forward"] / (medians["linears"] + medians["attentions"])
    counts = {names[func]: len(calls) for func, calls in recorder.calls.items()}
    print(f"heads {heads}, {dtype}, x_mask {frames_marked}, threads {torch.get_num_threads()}, calls {counts}")
    print("  " + ", ".join(f"{name} {value * 1e3:.0f} ms" for name, value in medians.items()))
    print(f"  ratio of medians {ratio:.3f} (rounds {ratios[0]:.3f} to {ratios[-1]:.3f}); bar {BAR}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--clock", default="wall", choices=CLOCKS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    with torch.inference_mode():
        for frames_marked in (False, True):
            measure(options.heads, options.rounds, getattr(torch, options.dtype), frames_marked, CLOCKS[options.clock])


if __name__ == "__main__":
    main()
