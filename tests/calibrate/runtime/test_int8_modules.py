"""The integer layers of the CPU and CUDA backends agree with the reference, and keep the tensors of the checkpoint."""

import copy
import io
import pickle
import re

import pytest
import torch
from diffusers.models.attention import FeedForward
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.calibrate.layers.install import install
from octavo.calibrate.layers.modules import QuantizedLinear
from octavo.calibrate.layers.noise_level import NoiseLevel
from octavo.calibrate.layers.products import sums_in_int32
from octavo.calibrate.layers.scheme import ACTIVATION, QParams, Range, codes
from octavo.calibrate.native import kernels
from octavo.calibrate.runtime import BACKENDS, Int8Linear, accelerate, cpu, optimized

from ...helpers.refusals import refused
from ...zoo.runtime_layers import SCHEMES, frozen, near

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("smoothed", [False, True], ids=["plain", "smoothed"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_linear_layers_agree_with_the_reference(scheme, dtype, bias, smoothed):
    torch.manual_seed(0)
    layer = frozen(nn.Linear(70, 33, bias), scheme, smoothed)
    fast = optimized(layer)
    for shape in ((70,), (1, 70), (0, 70), (17, 70), (2, 3, 70), (2, 1, 0, 70), (1, 2, 2, 3, 70)):
        x = 2 * torch.randn(shape).to(dtype)
        assert near(layer, fast(x), layer(x))
        assert near(layer, fast(input=x), layer(x))
    across = torch.randn(70, 9).to(dtype).t()
    assert not across.is_contiguous()
    assert near(layer, fast(across), layer(across))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SCHEMES),
    st.integers(1, 40),
    st.sampled_from([1, 2, 63, 64, 65, 1030]),
    st.sampled_from([1, 3, 16, 97]),
    st.sampled_from([0.0, 1e-30, 1.0, 1e4, 1e30]),
    st.floats(-10, 0),
    st.integers(0, 2**31),
)
def test_any_size_and_any_magnitude(scheme, rows, ins, outs, magnitude, low, seed):
    torch.manual_seed(seed)
    layer = frozen(nn.Linear(ins, outs), scheme, extents=[Range(low, 10.0 + low)] * 3)
    x = magnitude * torch.randn(rows, ins)
    assert near(layer, optimized(layer)(x), layer(x))


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_DYNAMIC"])
def test_the_largest_sums_there_are_do_not_saturate(scheme, sign):
    module = nn.Linear(5000, 4)
    module.weight.data.fill_(sign)
    layer = frozen(module, scheme)
    x = torch.full((3, 5000), 1e9)
    x[1] = -torch.inf if scheme == "W8A8" else -1e9
    wanted = layer(x)
    assert near(layer, optimized(layer)(x), wanted)
    assert wanted.abs().max() > 9000


@pytest.mark.parametrize("low", [-2.0, -1.0, -2.99, 0.0])
def test_ties_round_to_even_whatever_the_zero_point(low):
    layer = frozen(nn.Linear(1, 1, bias=False), "W8A8", extents=[Range(low, low + 3.0)])
    x = ((torch.arange(-300, 300) + 0.5) * layer.input_scale).view(-1, 1)
    codes = {int(z) for z in (layer.input_zero_point, optimized(layer).input_zero_point)}
    assert len(codes) == 1
    assert near(layer, optimized(layer)(x), layer(x))


@pytest.mark.parametrize("zero_point", [-128, -127, -3, 0, 126, 127])
@pytest.mark.parametrize("scale", [0.037, 2.0**-5, 201 * 2.0**-13, 1.0, 1e30])
def test_codes_made_in_fewer_steps_are_those_of_the_scheme(scale, zero_point):
    qparams = QParams(torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32))
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    ties = (torch.arange(-300, 300) + 0.5) * scale
    for x in (every[~every.isnan()], ties, ties.nextafter(ties + scale), ties.nextafter(ties - scale)):
        q, before = torch.empty(x.shape, dtype=torch.uint8), x.clone()
        cpu._quantize(q, x, qparams)
        assert torch.equal(q.int() - 128, codes(x, qparams, ACTIVATION).int())
        assert torch.equal(x, before)


class Largest(TorchDispatchMode):
    """Records the number of values of the largest float tensor that an operator returns."""

    values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and output.is_floating_point():
            self.values = max(self.values, output.numel())
        return output


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_weight_whose_input_stays_float_is_never_float_as_a_whole(dtype):
    torch.manual_seed(0)
    layer = frozen(nn.Linear(1200, 2000), "W8A16", smoothed=True)
    fast = optimized(layer)
    for rows in (1, 40):
        x = torch.randn(rows, 1200).to(dtype)
        wanted = layer(x)
        with Largest() as largest:
            y = fast(x)
        # Bounds the rounding of float32 sums, in whatever order they are added.
        sums = x.double().abs() @ layer._float_weight(torch.float64)[0].abs().t()
        allowed = torch.finfo(dtype).eps * wanted.double().abs() + 2.0**-20 * sums
        assert ((y.double() - wanted.double()).abs() <= allowed).all()
        assert y.dtype == dtype
        assert largest.values < layer.weight.numel() / 2
    assert fast.weight.dtype == torch.int8
    assert torch.equal(fast.weight, layer.weight)


def test_rows_with_noise_levels_of_their_own():
    layer = frozen(nn.Linear(6, 5), "W8A8_TIMESTEP")
    fast = optimized(layer)
    x = torch.randn(3, 4, 6)
    for levels in (torch.tensor([100.0, 900.0, 500.0]), torch.tensor([0.0, 1000.0])):
        layer.noise_level = fast.noise_level = NoiseLevel.of(levels)
        assert near(layer, fast(x), layer(x))
        assert near(layer, fast(x[:, 0]), layer(x[:, 0]))
    layer.noise_level = fast.noise_level = NoiseLevel.of(torch.tensor([100.0, 900.0, 500.0]))
    assert not torch.allclose(fast(x)[1], fast(x[[1, 1, 1]])[0])


@pytest.mark.parametrize("options", [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "padding": (2, 0), "stride": (2, 1), "bias": False},
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": 1, "groups": 5},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_convolutions_agree_with_the_reference(scheme, options, backend):
    torch.manual_seed(0)
    layer = frozen(nn.Conv2d(5, 10, **options), scheme, smoothed="groups" not in options)
    fast = optimized(layer, backend)
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((2, 5, 9, 8), (5, 9, 8), (0, 5, 9, 8)):
            x = torch.randn(shape).to(dtype)
            if x.numel() or backend == "cpu":
                assert near(layer, fast(x), layer(x))
    assert fast(x.new_ones(1, 5, 9, 8)).is_contiguous()
    layer.noise_level = fast.noise_level = NoiseLevel.of(torch.tensor([100.0, 900.0]))
    x = torch.randn(2, 5, 9, 8)
    assert near(layer, fast(x), layer(x))
    fast.unpack()
    assert torch.equal(fast.weight, layer.weight)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_matmul_of_cuda_pads_shapes_below_its_limits(scheme):
    for ins, outs in ((70, 33), (64, 8), (1, 1)):
        layer = frozen(nn.Linear(ins, outs), scheme, smoothed=True)
        fast = optimized(layer, "cuda")
        for rows in (1, 16, 17, 40):
            x = torch.randn(rows, ins)
            assert near(layer, fast(x), layer(x))
            assert torch.allclose(fast(x, gelu="tanh"), nn.functional.gelu(fast(x), approximate="tanh"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_tensors_of_the_checkpoint_stay(scheme):
    layer = frozen(nn.Linear(70, 33), scheme, smoothed=True)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    fast, x = optimized(layer), torch.randn(4, 70)
    wanted = fast(x)
    after = fast.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(after[name].dtype == before[name].dtype for name in before)
    fast(x)
    assert fast.weight.shape == (33, 70)
    assert (fast.in_features, fast.out_features, fast.scheme) == (70, 33, scheme)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), saved(fast)):
        assert torch.equal(other(x), wanted)
        assert all(torch.equal(other.state_dict()[name], before[name]) for name in before)
    moved = fast.to("meta")
    assert moved.weight.device.type == "meta"


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.skipif(not sums_in_int32(), reason="weights are not packed on this CPU")
def test_there_is_one_copy_of_the_weight():
    fast = optimized(frozen(nn.Linear(70, 33), "W8A8"))
    assert [tuple(p.shape) for p in fast.parameters()] == [(33, 70), (33,)]
    fast(torch.randn(4, 70))
    assert [tuple(p.shape) for p in fast.parameters()] == [(33,)]
    assert fast.numbers.weight.shape == (33, 70)
    assert list(dict(fast.named_parameters())) == ["weight", "bias"]


@pytest.mark.skipif(not sums_in_int32(), reason="weights are not packed on this CPU")
@pytest.mark.parametrize("copied", [False, True])
def test_the_first_forward_packs_all_layers_that_need_packing(copied):
    schemes = ("W8A8", "W8A16", "W8A8_DYNAMIC", "W8A8")
    model = nn.Sequential(*(frozen(nn.Linear(8, 8), scheme) for scheme in schemes))
    accelerate(model)
    model[3].to("meta")
    model = copy.deepcopy(model) if copied else model
    x = torch.randn(4, 8)
    y = model[0](x)
    assert [len(list(layer.parameters())) for layer in model] == [1, 2, 1, 2]
    assert model[2].weight.shape == (8, 8)
    assert torch.equal(model[0](x), y)
    assert [len(list(layer.parameters())) for layer in model] == [1, 2, 2, 2]


def test_a_layer_computes_with_the_loaded_state_dict():
    first, second = (frozen(nn.Linear(8, 8), "W8A8") for _ in range(2))
    fast, x = optimized(copy.deepcopy(first)), torch.randn(4, 8)
    fast(x)
    fast.load_state_dict(second.state_dict())
    assert near(second, fast(x), second(x))
    fast.load_state_dict(first.state_dict(), assign=True)
    assert near(first, fast(x), first(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_scales_stay_float32(dtype):
    fast = optimized(frozen(nn.Linear(8, 8), "W8A8"))
    refused(lambda: fast.to(dtype), 4, "float32")
    assert fast.deq.dtype == torch.float32
    assert fast.to(torch.float32) is fast.to("cpu") is fast


@pytest.mark.parametrize("target", [None, *kernels.targets()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_cpu_whose_products_saturate_computes_what_the_reference_does(target, dtype, monkeypatch):
    monkeypatch.setattr(cpu, "sums_in_int32", lambda: False)
    monkeypatch.setattr(kernels, "library", lambda: kernels.targets().get(target))
    for scheme in ("W8A8", "W8A8_DYNAMIC"):
        for module, x in ((nn.Linear(70, 33), torch.randn(5, 70)), (nn.Conv2d(3, 4, 2), torch.randn(2, 3, 4, 4))):
            layer, x = frozen(module, scheme), x.to(dtype)
            fast, wanted = optimized(layer)(x), layer(x)
            assert fast.dtype == dtype
            # the scale of a row and that of a channel may be multiplied in another order
            assert torch.equal(fast, wanted) if scheme == "W8A8" else torch.allclose(fast, wanted, rtol=2**-8)


def feed_forward(approximate, scheme="W8A8"):
    torch.manual_seed(0)
    model = nn.ModuleDict({"ff": FeedForward(16, activation_fn=f"gelu{approximate}"), "shared": nn.Linear(16, 16)})
    model["again"] = model["shared"]
    names = ("ff.net.0.proj", "ff.net.2", "shared")
    install(model, {name: frozen(model.get_submodule(name), scheme) for name in names})
    return model


@pytest.mark.parametrize("backend", [None, "cuda", "reference"])
@pytest.mark.parametrize("approximate", ["", "-approximate"])
def test_a_model_is_accelerated_and_keeps_its_names(approximate, backend):
    model = feed_forward(approximate)
    before, x = copy.deepcopy(model), torch.randn(2, 5, 16)
    accelerate(model, backend)
    assert list(model.state_dict()) == list(before.state_dict())
    assert isinstance(model["shared"], Int8Linear)
    assert model["shared"] is model["again"]
    proj, reference = model["ff"].net[0], before["ff"].net[0]
    assert type(proj) is not type(reference)
    assert torch.allclose(proj(x), reference(x), rtol=1e-5, atol=2e-6)
    half = x.bfloat16()
    assert torch.allclose(proj(half).float(), reference(half).float(), rtol=2**-6, atol=2**-8)
    accelerate(model, "reference")
    assert torch.equal(model["ff"](x), before["ff"](x))


def test_a_hook_between_a_layer_and_its_gelu_still_runs():
    model = feed_forward("")
    calls = []
    model["ff"].net[0].register_forward_hook(lambda *_: calls.append(1))
    accelerate(model)
    model["ff"](torch.randn(1, 16))
    assert calls == [1]


def test_a_backend_that_does_not_exist_is_refused():
    refused(lambda: accelerate(feed_forward(""), "tpu"), 2, re.compile(r"'tpu'.*cpu, cuda, npu, reference"))
    assert set(BACKENDS) == {"cpu", "cuda", "npu", "reference"}


def test_other_devices_use_the_reference():
    fast = optimized(frozen(nn.Linear(8, 4), "W8A16")).to("meta")
    assert isinstance(fast, QuantizedLinear)
    assert fast(torch.zeros(2, 8, device="meta")).shape == (2, 4)


def test_one_thread_computes_what_two_do():
    fast, x = optimized(frozen(nn.Linear(64, 48), "W8A8")), torch.randn(100, 64)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        wanted = fast(x)
        torch.set_num_threads(1)
        assert torch.equal(fast(x), wanted)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not cpu.multiplies_codes(), reason="the reference computes here, and keeps no codes")
def test_layers_with_one_input_share_its_integers_and_see_when_it_changes():
    torch.manual_seed(0)
    model = nn.ModuleList(frozen(nn.Linear(32, 16), "W8A8") for _ in range(2))
    for layer in model:
        layer.input_scale.copy_(model[0].input_scale)
    accelerate(model)
    x, exact = torch.randn(4, 32), []
    with torch.no_grad():
        for change in (0.0, 1.0):
            x.add_(change)
            for layer in model:
                exact.append(near(layer, layer(x), QuantizedLinear(layer.numbers)(x)))
        assert all(exact)
        assert model[0].shared_codes is model[1].shared_codes
        first = model[0].shared_codes._last[3]
        model[1](x)
        assert model[0].shared_codes._last[3] is first
        model[1](x.clone())
        assert model[0].shared_codes._last[3] is not first
    copied = copy.deepcopy(model)
    assert copied[0].shared_codes is copied[1].shared_codes is not model[0].shared_codes
    assert torch.equal(copied[0](x), model[0](x))
