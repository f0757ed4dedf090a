"""The Triton kernels put out what the reference puts out: on a GPU, or on a CPU under Triton's interpreter.

The interpreter has to be chosen before Triton is imported. So on a CPU one test runs the others in another process.
"""

import copy
import os
import random
import subprocess
import sys

import pytest
import torch
from torch import nn

from octavo.calibrate.layers.noise_level import NoiseLevel
from octavo.calibrate.layers.scheme import Range
from octavo.calibrate.runtime import cuda, optimized

from ...zoo.runtime_layers import SCHEMES, agrees, frozen

triton = pytest.importorskip("triton", reason="Triton is not installed: pip install 'octavo[triton]'")

from octavo.calibrate.runtime import triton_kernels  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
runs = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="run by test_kernels_under_the_interpreter"
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GELUS = (None, "none", "tanh")
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int8: "*i8"}


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the other tests run in this process")
def test_kernels_under_the_interpreter():
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        pytest.skip("the interpreter of this Triton does not run with numpy 2.4")
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout[-3000:]


def is_right(layer, x, gelu=None):
    """Whether the kernels compute the output of a reference layer on a CPU."""
    y = triton_kernels.linear(optimized(copy.deepcopy(layer)).to(DEVICE), x.to(DEVICE), gelu)
    return agrees(layer, x, y.cpu(), gelu)


def layer_of(scheme, dtype, ins, outs, bias=True, smoothed=False, extents=None):
    """A reference layer; under the interpreter, which rounds to bfloat16 towards zero, products with the multiplier
    are exact in bfloat16."""
    layer = frozen(nn.Linear(ins, outs, bias), scheme, smoothed, *([extents] if extents else []))
    if smoothed and dtype == torch.bfloat16:
        layer.mul_scale.copy_(torch.exp2(torch.randint(-3, 3, (ins,)).float()))
    return layer


@runs
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_any_layer_and_any_size(scheme, seed):
    torch.manual_seed(seed)
    draw = random.Random(f"{scheme} {seed}")
    dtype, gelu = DTYPES[seed % 3], draw.choice(GELUS)
    if INTERPRETED and scheme == "W8A16" and dtype == torch.bfloat16:
        dtype = torch.float16  # the interpreter multiplies the bits of bfloat16 numbers
    rows, ins, outs = draw.choice([1, 2, 17, 21]), draw.randint(1, 200), draw.choice([1, 16, 33, 97])
    low, magnitude = draw.uniform(-10, 0), draw.choice([1.0, 1.0, 1e-30, 1e3])
    extents = [Range(low, 10.0 + low)] * 3
    layer = layer_of(scheme, dtype, ins, outs, draw.random() < 0.7, draw.random() < 0.5, extents)
    assert is_right(layer, (magnitude * torch.randn(rows, ins)).to(dtype), gelu)


@runs
@pytest.mark.parametrize("scheme", SCHEMES)
def test_shapes_of_inputs(scheme):
    layer = layer_of(scheme, torch.float32, 40, 12)
    for shape in ((40,), (3, 40), (2, 3, 40), (1, 2, 1, 40)):
        assert is_right(layer, torch.randn(shape))
    assert is_right(layer, torch.randn(40, 5).t())


@runs
@pytest.mark.parametrize("scheme", ["W8A8", "W8A16"])
def test_the_largest_tile(scheme):
    assert is_right(layer_of(scheme, torch.float16, 150, 130), torch.randn(66, 150).half())


@runs
@pytest.mark.parametrize("low", [-3.0, -1.0, -0.2])
def test_ties_round_to_even_after_the_zero_point_is_added(low):
    layer = frozen(nn.Linear(64, 3, bias=False), "W8A8", extents=[Range(low, low + 3.0)])
    x = ((torch.arange(-320, 320) + 0.5) * layer.input_scale).view(-1, 64)
    x = torch.cat([x, x.nextafter(x + 1), x.nextafter(x - 1)])
    scale, zero_point = layer.input_scale.view(1), layer.input_zero_point.view(1)
    q = torch.ops.octavo.codes(x.to(DEVICE), None, scale.to(DEVICE), zero_point.to(DEVICE))
    assert torch.equal(q.cpu().float(), layer.input.codes(x).q)
    assert int(zero_point) % 2
    assert not torch.equal(q.cpu().float(), ((x / scale).round() + zero_point).clamp(-128, 127))


@runs
def test_codes_of_tokens_without_a_scale_are_zeros():
    layer = layer_of("W8A8_DYNAMIC", torch.float32, 24, 8)
    x = torch.randn(4, 24)
    x[1], x[2] = 0.0, 1e-40
    q, scale = torch.ops.octavo.token_codes(x.to(DEVICE), None)
    wanted = layer.input.codes(x)
    assert torch.equal(q.cpu().float(), wanted.q)
    assert torch.equal(scale.cpu(), wanted.scale.flatten())
    assert scale[1] == scale[2] == 1.0


@runs
def test_samples_have_the_ranges_of_their_noise_levels():
    layer = layer_of("W8A8_TIMESTEP", torch.float32, 20, 9)
    layer.noise_level = NoiseLevel.of(torch.tensor([100.0, 900.0, 500.0]))
    x = torch.randn(3, 2, 20)
    assert is_right(layer, x)
    assert is_right(layer, x[:, 0])
    fast = optimized(layer).to(DEVICE)
    assert not torch.equal(
        triton_kernels.linear(fast, x.to(DEVICE))[0], triton_kernels.linear(fast, x[[2, 1, 0]].to(DEVICE))[2]
    )


@runs
def test_gradients_and_empty_inputs_are_left_to_torch():
    layer, x = optimized(layer_of("W8A16", torch.float32, 8, 4)), torch.randn(2, 8)
    assert triton_kernels.supports(layer, x)
    assert not triton_kernels.supports(layer, x.double())
    assert not triton_kernels.supports(layer, x[:0])
    assert not triton_kernels.supports(layer, x.clone().requires_grad_())


@runs
@torch.no_grad()
@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "W8A8_TIMESTEP"])
def test_the_backend_runs_the_kernels_in_graphs_too(scheme, monkeypatch):
    monkeypatch.setattr(cuda, "triton_kernels", triton_kernels)
    monkeypatch.setattr(cuda, "_runs_kernels", torch.compiler.assume_constant_result(lambda device: True))
    layer, graphs = optimized(layer_of(scheme, torch.float32, 24, 8, smoothed=True), "cuda").to(DEVICE), []

    def backend(module, _):
        graphs.append([str(node.target) for node in module.graph.nodes])
        return module

    torch.compiler.reset()
    compiled = torch.compile(lambda x: layer(x, gelu="tanh") + 1, backend=backend, fullgraph=True)
    for rows in (3, 5):
        x = torch.randn(1, rows, 24).to(DEVICE)
        assert torch.equal(compiled(x), triton_kernels.linear(layer, x, "tanh") + 1)
        assert torch.equal(layer(x), triton_kernels.linear(layer, x))
    operators = {target.split(".")[1] for target in graphs[0] if target.startswith("octavo.")}
    codes = {"W8A8": {"codes"}, "W8A8_DYNAMIC": {"token_codes"}, "W8A16": set()}[scheme]
    assert operators == codes | {"scaled_product"}


def compiled_for(capability, kernel, pointers, constants, options):
    """A kernel compiled for an NVIDIA GPU of this compute capability; needs no GPU."""
    types = {
        name: pointers.get(name, "i32" if name in ("rows", "ins", "outs") else "constexpr") for name in kernel.arg_names
    }
    source = triton.compiler.ASTSource(
        kernel, types, {name: None for name in types if types[name] == "constexpr"} | constants
    )
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=options)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kind", ["static", "dynamic", "float"])
def test_kernels_compile_for_gpus(kind, capability):
    dtype = torch.bfloat16 if kind == "float" else torch.int8
    tile, scales = triton_kernels.tile_of(4096, dtype), {"row_scale": "*fp32"} if kind == "dynamic" else {}
    options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
    bias = "*i32" if kind == "static" else "*bf16"
    pointers = {"x": POINTERS[dtype], "weight": "*i8", "scale": "*fp32", "bias": bias, "y": "*bf16"} | scales
    product = compiled_for(
        capability, triton_kernels.product_kernel, pointers, {"KIND": kind, "GELU": "tanh"} | tile, options
    )
    assert product.metadata.shared <= 99 << 10  # bytes that a program has on GPUs of compute capability 8.6 and 8.9
    assert "mma" in product.asm["ptx"]
    assert ("s8.s8" in product.asm["ptx"]) == (kind != "float")
    if kind != "float":
        dynamic = kind == "dynamic"
        pointers = {"x": "*bf16", "factors": "*bf16", "scale": "*fp32", "q": "*i8"}
        pointers |= {} if dynamic else {"zero_point": "*i32"}
        codes = compiled_for(
            capability, triton_kernels.codes_kernel, pointers, {"DYNAMIC": dynamic, "BLOCK": 2048}, {"num_warps": 4}
        )
        assert "div.rn.f32" in codes.asm["ptx"]
        assert "div.full" not in codes.asm["ptx"]
