"""Checks integer layers on a GPU against the reference, and measures their speed beside that of bfloat16 and torchao.

    python -m bench.device [--device cuda] [--layers 2] [--tokens 1024 4096] [--rounds 10]

Takes at most six minutes. Exit code 0: all checks passed; 1: a check failed; 7: there is no GPU. `--device cpu` runs
the checks alone, on the CPU. Speed is that of the transformer of Stable Diffusion 3 medium with random weights and
fewer layers: the median of calls that alternate with those of the other models, by CUDA events.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from octavo.calibrate.layers.install import install
from octavo.calibrate.layers.noise_level import NoiseLevel
from octavo.calibrate.layers.scheme import Range
from octavo.calibrate.runtime import accelerate, cuda, optimized
from tests.zoo.random_sd3 import Call
from tests.zoo.runtime_layers import SCHEMES, agrees, frozen

from .bench_runtime import call_of, make_model

LIMIT = 300  # seconds after which no other model is compiled and measured; the whole run takes at most 360
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 512), (17, 512), (2, 77, 512), (300, 129))  # of inputs; the last axis is that of the channels
CONVOLUTIONS = (
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 2, "stride": 2, "bias": False},
    {"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 4},
)
LEAST = {"block": 40.0, "graph": 30.0}  # dB: a value that lies between two codes may round to the other one

Check = tuple[str, bool, str]  # name, whether it passed, what was measured


# --- checks -----------------------------------------------------------------------------------------------------------


def linear_layers(device: str) -> Iterator[Check]:
    """Checks linear layers of every scheme, dtype and shape against the reference on the CPU."""
    for scheme in SCHEMES:
        for dtype in DTYPES:
            wrong = [
                f"{shape}, GELU {gelu}"
                for shape in SHAPES
                for gelu in (None, "none", "tanh")
                if not _is_right(nn.Linear(shape[-1], 200), scheme, torch.randn(shape).to(dtype), device, gelu)
            ]
            yield f"linear, {scheme}, {dtype}", not wrong, "; ".join(wrong)


def samples(device: str) -> Iterator[Check]:
    """Checks that each sample of a batch has the range of its own noise level."""
    levels = torch.tensor([100.0, 900.0, 500.0])
    for module, x in ((nn.Linear(64, 40), torch.randn(3, 5, 64)), (nn.Conv2d(4, 6, 3), torch.randn(3, 4, 8, 8))):
        right = _is_right(module, "W8A8_TIMESTEP", x, device, levels=levels)
        yield f"samples with noise levels of their own, {type(module).__name__}", right, ""


def convolutions(device: str) -> Iterator[Check]:
    """Checks convolutions of every scheme against the reference on the CPU."""
    for scheme in SCHEMES:
        for dtype in DTYPES[:2]:
            wrong = [
                str(options)
                for options in CONVOLUTIONS
                if not _is_right(nn.Conv2d(16, 24, **options), scheme, torch.randn(2, 16, 20, 18).to(dtype), device)  # type: ignore[arg-type]
            ]
            yield f"convolution, {scheme}, {dtype}", not wrong, "; ".join(wrong)


def _is_right(
    module: nn.Module, scheme: str, x: Tensor, device: str, gelu: str | None = None, levels: Tensor | None = None
) -> bool:
    layer = frozen(module, scheme, smoothed=getattr(module, "groups", 1) == 1)
    layer.noise_level = NoiseLevel.of(torch.tensor(500.0) if levels is None else levels)
    fast = optimized(copy.deepcopy(layer)).to(device)
    y = fast(x.to(device), **({} if gelu is None else {"gelu": gelu})).cpu()
    return agrees(layer, x, y, gelu)


class _Attention(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask)


def attention(device: str) -> Iterator[Check]:
    """Checks the attention of an accelerated model against the formula in float64."""
    model = _Attention()
    accelerate(model)
    for dtype, least in ((torch.float32, 90.0), (torch.bfloat16, 35.0)):
        for keys in (200, 333):
            query, key, value = (torch.randn(2, 4, rows, 64).to(dtype) for rows in (200, keys, keys))
            mask = torch.rand(2, 1, 200, keys) < 0.8
            scores = (query.double() @ key.double().mT / 8).masked_fill(~mask, -torch.inf)
            y = model(*(tensor.to(device) for tensor in (query, key, value, mask)))
            yield _close(f"attention, {dtype}, {keys} keys", y, scores.softmax(-1) @ value.double(), least)


def sd3_block(device: str) -> Iterator[Check]:
    """Checks a transformer with one block of Stable Diffusion 3 medium, for every scheme, against the same model with
    the reference backend; then the same model in a graph of torch.compile."""
    model, call = make_model(1), call_of(1024 if device == "cuda" else 64, torch.bfloat16, 77)
    for scheme in SCHEMES:
        integer = integer_model(model, scheme).to(device)
        wanted, compiled = run(_accelerated(integer, "reference"), call), _accelerated(integer, None)
        y = run(compiled, call)
        yield _close(f"SD3 block, {scheme}", y, wanted, LEAST["block"])
        torch.compiler.reset()
        # layers with a range for each bin of noise levels run between the graphs
        compiled.compile(fullgraph=scheme != "W8A8_TIMESTEP", backend="inductor" if device == "cuda" else "aot_eager")
        yield _close(f"SD3 block, {scheme}, torch.compile", run(compiled, call), y, LEAST["graph"])


def _close(name: str, y: Tensor, wanted: Tensor, least: float) -> Check:
    signal, error = wanted.double().cpu(), y.double().cpu() - wanted.double().cpu()
    sqnr = float(10 * torch.log10(signal.square().sum() / error.square().sum()))
    return name, sqnr >= least, f"{sqnr:.1f} dB, at least {least:.0f}"


def _accelerated(model: nn.Module, backend: str | None) -> nn.Module:
    fast = copy.deepcopy(model)
    accelerate(fast, backend)
    return fast


CHECKS: tuple[Callable[[str], Iterator[Check]], ...] = (linear_layers, samples, convolutions, attention, sd3_block)


# --- models -----------------------------------------------------------------------------------------------------------


def quantized_names(model: nn.Module) -> list[str]:
    """Returns the names of the linear layers inside the blocks."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linears if name.startswith("transformer_blocks")]


def integer_model(model: SD3Transformer2DModel, scheme: str) -> nn.Module:
    """Returns a copy of the float32 `model` in bfloat16, with integer layers of `scheme` inside its blocks."""
    extents, half = [Range(-4.0, 5.0)] * 3, copy.deepcopy(model).to(torch.bfloat16)
    install(half, {n: frozen(model.get_submodule(n), scheme, extents=extents) for n in quantized_names(model)})
    return half


@torch.no_grad()
def run(model: nn.Module, call: Call) -> Tensor:
    """Returns the output of a call of `model`, on its device."""
    device = next(model.parameters()).device
    moved = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in call.kwargs.items()}
    y: Tensor = model(**moved)[0]
    return y


def _octavo(model: SD3Transformer2DModel, scheme: str) -> nn.Module:
    return _accelerated(integer_model(model, scheme), None)


def _torchao(model: SD3Transformer2DModel, config: str, **options: object) -> nn.Module:
    from torchao import quantization

    names, half = set(quantized_names(model)), copy.deepcopy(model).to("cuda", torch.bfloat16)
    quantization.quantize_(half, getattr(quantization, config)(**options), filter_fn=lambda _, name: name in names)
    return half


MODELS: dict[str, Callable[[SD3Transformer2DModel], nn.Module]] = {
    "bfloat16": lambda model: copy.deepcopy(model).to(torch.bfloat16),
    "Octavo static": lambda model: _octavo(model, "W8A8"),
    "Octavo dynamic": lambda model: _octavo(model, "W8A8_DYNAMIC"),
    "Octavo weight-only": lambda model: _octavo(model, "W8A16"),
    "torchao int8 dynamic": lambda model: _torchao(model, "Int8DynamicActivationInt8WeightConfig"),
    "torchao float8": lambda model: _torchao(model, "Float8DynamicActivationFloat8WeightConfig"),
}


# --- speed ------------------------------------------------------------------------------------------------------------


def models_to_measure(layers: int, tokens: list[int], end: float) -> dict[str, nn.Module]:
    """Makes the models on the GPU, each also compiled, and warms them up; leaves out those that do not run here."""
    torch._dynamo.config.recompile_limit = 64  # all models and sizes share the code that is compiled
    torch.compiler.reset()
    float_model, models = make_model(layers), {}
    for name, make in MODELS.items():
        for compiled in (False, True):
            label = f"{name}, torch.compile" if compiled else name
            if time.monotonic() > end:
                print(f"{label}: not measured, no time left", flush=True)
                continue
            try:
                model = make(float_model).to("cuda")
                if compiled:
                    model.compile(dynamic=False)
                for count in tokens:
                    run(model, call_of(count, torch.bfloat16))
            except Exception as error:  # an unfit peer must not end the run
                print(f"{label}: does not run: {type(error).__name__}: {str(error).splitlines()[0][:100]}", flush=True)
                continue
            models[label] = model
            print(f"{label}: ready", flush=True)
    return models


def milliseconds(models: dict[str, nn.Module], tokens: int, rounds: int) -> dict[str, float]:
    """Measures the median milliseconds of a call of each model; the calls alternate, after a warm-up round."""
    call = call_of(tokens, torch.bfloat16)
    call = Call((), {name: v.cuda() if isinstance(v, Tensor) else v for name, v in call.kwargs.items()})
    times: dict[str, list[float]] = {name: [] for name in models}
    for round_index in range(rounds + 1):
        for name, model in models.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run(model, call)
            end.record()
            torch.cuda.synchronize()
            times[name] += [start.elapsed_time(end)] if round_index else []
    return {name: statistics.median(values) for name, values in times.items()}


def print_speed(layers: int, tokens: list[int], rounds: int, end: float) -> bool:
    """Prints the table of speed; returns whether all of Octavo's models ran."""
    if find_spec("torchao") is None:
        print("torchao is not installed: pip install torchao")
        for name in [name for name in MODELS if name.startswith("torchao")]:
            del MODELS[name]
    models = models_to_measure(layers, tokens, end)
    medians = {count: milliseconds(models, count, rounds) for count in tokens}
    base = "bfloat16, torch.compile" if "bfloat16, torch.compile" in models else "bfloat16"
    print(f"\n{torch.cuda.get_device_name()}, {layers} layers; in brackets the speed relative to {base}")
    print(f"| model | {' | '.join(f'{count} tokens' for count in tokens)} |\n|---{'|---' * len(tokens)}|")
    for name in models:
        cells = [f"{times[name]:.2f} ms ({times[base] / times[name]:.2f} x)" for times in medians.values()]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return all(name in models for name in MODELS if name.startswith("Octavo"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    begin = time.monotonic()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA GPU here. Use --device cpu to try the checks.")
        sys.exit(7)
    kernels = "Octavo's Triton kernels" if cuda.triton_kernels else "torch._int_mm"
    on_gpu = options.device == "cuda"
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {kernels}" if on_gpu else "checks on the CPU")
    torch.backends.cudnn.allow_tf32 = False  # convolutions in float32 are compared with float32
    torch.manual_seed(0)
    failed = 0
    for check in CHECKS:
        for name, passed, measured in check(options.device):
            failed += not passed
            print(f"{'ok   ' if passed else 'FAULT'} {name}{': ' if measured else ''}{measured}", flush=True)
    complete = not on_gpu or print_speed(options.layers, options.tokens, options.rounds, begin + LIMIT)
    print(f"{failed} checks failed, {time.monotonic() - begin:.0f} s")
    sys.exit(1 if failed or not complete else 0)


if __name__ == "__main__":
    main()
