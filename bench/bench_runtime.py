"""Measures the speed of integer layers: an SD3 transformer with random weights in float32, bfloat16 and int8.

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
from octavo.calibrate.runtime import accelerate, attend
from octavo.calibrate.settings import Settings
from octavo.pipelines.sd3 import SD3
from tests.zoo.random_sd3 import Call

from .runtime_memory import memory_of

TEXT = 333  # tokens, beside those of the picture: 77 of CLIP and 256 of T5


def make_model(layers: int = 4) -> SD3Transformer2DModel:
    """The transformer of Stable Diffusion 3 with 4 of its 24 layers."""
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=layers, attention_head_dim=64,
        num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
        pos_embed_max_size=192,
    ).eval().requires_grad_(False)  # fmt: skip


def call_of(tokens: int, dtype: torch.dtype = torch.float32, text: int = TEXT) -> Call:
    """A call for one picture with this number of tokens."""
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
    """One model in three forms; float layers of the int8 form are bfloat16."""
    model = make_model(layers)
    settings = Settings(defaults=SD3.keep_float, activations=activations, sqnr_calls=0)
    calls = [call_of(256, text=77)]
    found = calibrate(model, lambda: calls, settings).layers
    half = copy.deepcopy(model).to(torch.bfloat16)
    integer = copy.deepcopy(half)
    install(integer, found)
    accelerate(integer)
    return {
        "float32": (model, torch.float32),
        "bfloat16": (half, torch.bfloat16),
        "int8": (integer, torch.bfloat16),
    }


@torch.no_grad()
def measure(models: dict[str, tuple[nn.Module, torch.dtype]], tokens: int, text: int, rounds: int) -> dict[str, float]:
    """Median seconds of a call of each model, called alternately after a warm-up call."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for at in range(rounds + 1):
        for name, (model, dtype) in models.items():
            call = call_of(tokens, dtype, text)
            start = time.perf_counter()
            model(**call.kwargs)
            if at:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in times.items()}


def print_memory(models: dict[str, tuple[nn.Module, torch.dtype]], tokens: int) -> None:
    """Prints memory and load time of each model, and the ratios of int8 to bfloat16."""
    print("| model | file | load | peak of a call | above the libraries' |\n|---|---|---|---|---|")
    found = {}
    for name, (model, dtype) in models.items():
        found[name] = each = memory_of(model, call_of(tokens, dtype).kwargs)
        cells = f"{each['file']:.0f} MiB | {each['load']:.2f} s | {each['raw']:.0f} MiB | {each['peak']:.0f} MiB"
        print(f"| {name} | {cells} |", flush=True)
    raw, above = (found["int8"][key] / found["bfloat16"][key] for key in ("raw", "peak"))
    print(f"| int8 : bfloat16 | | | {raw:.2f} x | {above:.2f} x |")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--text", type=int, default=TEXT, help="text tokens; 77 is without T5")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--activations", default="static")
    parser.add_argument("--torch-attention", action="store_true", help="use torch's attention in the int8 model too")
    parser.add_argument("--compile", action="store_true", help="add the int8 model by torch.compile, and its ratios")
    parser.add_argument("--profile", action="store_true", help="print the slowest operators of the int8 model")
    parser.add_argument("--memory", action="store_true", help="print memory and load time only, at the first --tokens")
    options = parser.parse_args()
    models = make_models(options.activations)
    if options.torch_attention:
        attend(models["int8"][0], False)
    if options.memory:
        print_memory(models, options.tokens[0])
        return
    if options.compile:
        models["int8, torch.compile"] = (torch.compile(models["int8"][0]), torch.bfloat16)
    print(f"| tokens | {' | '.join(models)} | over float32 | over bfloat16 |\n{'|---' * (len(models) + 3)}|")
    for tokens in options.tokens:
        found = measure(models, tokens, options.text, options.rounds)
        cells = " | ".join(f"{1000 * seconds:.0f} ms" for seconds in found.values())
        ratios = " | ".join(f"{found[name] / list(found.values())[-1]:.2f} x" for name in ("float32", "bfloat16"))
        print(f"| {tokens} | {cells} | {ratios} |", flush=True)
        if options.profile:
            with torch.inference_mode(), torch.profiler.profile() as profile:
                models["int8"][0](**call_of(tokens, torch.bfloat16, options.text).kwargs)
            print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=40))


if __name__ == "__main__":
    main()
