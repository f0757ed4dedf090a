"""Measures the speed of an SD3 transformer with random weights in float32, bfloat16 and int8.

OMP_NUM_THREADS=2 python -m bench.bench_runtime [--tokens 1024 4096] [--rounds 5] [--activations dynamic]
    [--torch-attention] [--compile] [--memory]
"""

import argparse
import copy
import statistics
import time

import torch
from diffusers import SD3Transformer2DModel
from torch import nn

from octavo.calibrate.calibration import calibrate
from octavo.calibrate.layers.install import install
from octavo.calibrate.runtime import accelerate
from octavo.calibrate.settings import Settings
from octavo.pipelines.sd3 import SD3
from tests.zoo.random_sd3 import Call

from .runtime_memory import memory_of

# the operators that would be left out if modulation, gate and residual were part of the layers' kernels
SMALL = ("aten::add", "aten::mul", "aten::copy_", "aten::cat", "aten::native_layer_norm")
TEXT = 333  # text tokens of Stable Diffusion 3: 77 of CLIP and 256 of T5


def make_model(layers: int = 4) -> SD3Transformer2DModel:
    """Makes the transformer of Stable Diffusion 3 medium, by default with 4 of its 24 layers."""
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=layers, attention_head_dim=64,
        num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
        pos_embed_max_size=192,
    ).eval().requires_grad_(False)  # fmt: skip


def call_of(tokens: int, dtype: torch.dtype = torch.float32, text: int = TEXT) -> Call:
    """Makes a call for one picture with `tokens` image tokens and `text` text tokens."""
    generator, side = torch.Generator().manual_seed(tokens), 2 * int(tokens**0.5)
    kwargs = {
        "hidden_states": torch.randn(1, 16, side, side, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(1, text, 4096, generator=generator).to(dtype),
        "pooled_projections": torch.randn(1, 2048, generator=generator).to(dtype),
        "timestep": torch.full((1,), 500.0),
        "return_dict": False,
    }
    return Call((), kwargs)


def make_models(activations: str, layers: int = 4) -> dict[str, tuple[nn.Module, torch.dtype]]:
    """Makes the model in float32, bfloat16 and int8, each with the dtype of its inputs.

    The float layers of the int8 model are bfloat16.
    """
    model = make_model(layers)
    settings = Settings(defaults=SD3.keep_float, activations=activations, sqnr_calls=0)
    calls = [call_of(256, text=77)]
    integer_layers = calibrate(model, lambda: calls, settings).layers
    half = copy.deepcopy(model).to(torch.bfloat16)
    integer = copy.deepcopy(half)
    install(integer, integer_layers)
    accelerate(integer)
    return {
        "float32": (model, torch.float32),
        "bfloat16": (half, torch.bfloat16),
        "int8": (integer, torch.bfloat16),
    }


@torch.no_grad()
def measure(models: dict[str, tuple[nn.Module, torch.dtype]], tokens: int, text: int, rounds: int) -> dict[str, float]:
    """Measures the median seconds of a call of each model. The calls alternate, after a warm-up call of each."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for round_index in range(rounds + 1):
        for name, (model, dtype) in models.items():
            call = call_of(tokens, dtype, text)
            start = time.perf_counter()
            model(**call.kwargs)
            if round_index:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def print_profile(model: nn.Module, tokens: int, text: int) -> None:
    """Prints the slowest operators of a call of the int8 model, and the share of the call's processor time that the
    small operators between its layers take."""
    kwargs = call_of(tokens, torch.bfloat16, text).kwargs
    start = time.process_time()
    with torch.inference_mode(), torch.profiler.profile() as profile:
        model(**kwargs)
    seconds = time.process_time() - start
    operators = profile.key_averages()
    print(operators.table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=40))
    small = sum(entry.self_cpu_time_total for entry in operators if entry.key in SMALL) / 1e6
    print(f"small operators: {small * 1000:.0f} of {seconds * 1000:.0f} ms of processor time ({small / seconds:.1%})")


def print_memory(models: dict[str, tuple[nn.Module, torch.dtype]], tokens: int) -> None:
    """Prints the memory and the load time of each model, and the memory ratios of int8 to bfloat16."""
    print("| model | file | load | peak of a call | above the libraries' |\n|---|---|---|---|---|")
    measurements = {}
    for name, (model, dtype) in models.items():
        measurements[name] = numbers = memory_of(model, call_of(tokens, dtype).kwargs)
        cells = [f"{numbers['file']:.0f} MiB", f"{numbers['load']:.2f} s"]
        cells += [f"{numbers['raw']:.0f} MiB", f"{numbers['peak']:.0f} MiB"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    raw, above = (measurements["int8"][key] / measurements["bfloat16"][key] for key in ("raw", "peak"))
    print(f"| int8 : bfloat16 | | | {raw:.2f} x | {above:.2f} x |")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--text", type=int, default=TEXT, help="number of text tokens; without T5 it is 77")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--activations", default="static")
    parser.add_argument("--torch-attention", action="store_true", help="use torch's attention in the int8 model too")
    parser.add_argument("--compile", action="store_true", help="also measure the int8 model after torch.compile")
    parser.add_argument("--profile", action="store_true", help="print the slowest operators of the int8 model")
    parser.add_argument("--memory", action="store_true", help="print memory and load time only, at the first --tokens")
    options = parser.parse_args()
    models = make_models(options.activations)
    if options.torch_attention:
        accelerate(models["int8"][0], attention="torch")
    if options.memory:
        print_memory(models, options.tokens[0])
        return
    if options.compile:
        models["int8, torch.compile"] = (torch.compile(models["int8"][0]), torch.bfloat16)
    print(f"| tokens | {' | '.join(models)} | over float32 | over bfloat16 |\n{'|---' * (len(models) + 3)}|")
    for tokens in options.tokens:
        medians = measure(models, tokens, options.text, options.rounds)
        cells = " | ".join(f"{1000 * seconds:.0f} ms" for seconds in medians.values())
        ratios = " | ".join(f"{medians[name] / list(medians.values())[-1]:.2f} x" for name in ("float32", "bfloat16"))
        print(f"| {tokens} | {cells} | {ratios} |", flush=True)
        if options.profile:
            print_profile(models["int8"][0], tokens, options.text)


if __name__ == "__main__":
    main()
