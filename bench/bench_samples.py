"""Measures the overhead of replays: copying arguments, digests of samples, watching which weights a forward reads.

    OMP_NUM_THREADS=1 python -m bench.bench_samples

Prints the least milliseconds of five rounds. Measured are a forward of the bundled denoiser, a copy of its arguments,
and the same forward while its weights are watched; a copy of the arguments of Stable Diffusion 3 at 1024 x 1024; a copy
and a digest of 16 pictures of 224 x 224.
"""

import time
from collections.abc import Callable

import torch

from octavo.calibrate.plan import make_plan
from octavo.calibrate.preparation.weight_reads import weights_used_elsewhere
from octavo.calibrate.replay.calls import copied_to, evaluating, run
from octavo.calibrate.replay.user_data import Sample, digest_of
from octavo.capture.listener import Listener
from octavo.pipelines.load import DEMO, load_pipeline

ROUNDS = 5
CPU = torch.device("cpu")


def least(action: Callable[[], object]) -> float:
    """Runs `action` ROUNDS times; returns the least milliseconds."""
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return 1000 * min(times)


def main() -> None:
    """Prints the table."""
    pipe = load_pipeline(DEMO, dtype=torch.float32)
    model = pipe.transformer.eval()
    pipe.transformer = Listener(model)
    pipe("a red ring above a white cross on a blue background", num_inference_steps=1, output_type="latent")
    call, names = Sample((), pipe.transformer.inputs[0]), make_plan(model).quantized
    large = {
        "hidden_states": torch.randn(2, 16, 128, 128),
        "encoder_hidden_states": torch.randn(2, 333, 4096),
        "pooled_projections": torch.randn(2, 2048),
    }
    pictures = Sample((torch.randn(16, 3, 224, 224),), {})
    with evaluating(model):
        rows = {
            "forward of the bundled denoiser, with a copy of its arguments": lambda: run(model, call, 0),
            "the copy alone": lambda: copied_to(call.kwargs, CPU),
            "the forward while weights are watched": lambda: weights_used_elsewhere(model, call, names),
            "copy of Stable Diffusion 3's arguments, 1024 x 1024": lambda: copied_to(large, CPU),
            "copy of 16 pictures": lambda: copied_to(pictures.args, CPU),
            "digest of 16 pictures": lambda: digest_of(pictures),
        }
        for name, action in rows.items():
            print(f"{least(action):10.2f} ms  {name}")


if __name__ == "__main__":
    main()
