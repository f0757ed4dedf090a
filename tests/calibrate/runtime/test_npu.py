"""The NPU layers call the operators of torch_npu with valid arguments, and agree with the reference."""

import pytest
import torch
from torch import nn

from octavo.calibrate.layers.noise_level import NoiseLevel
from octavo.calibrate.layers.scheme import Range
from octavo.calibrate.runtime import optimized

from ...helpers.npu_standin import NUMBERS, npu_operators
from ...zoo.runtime_layers import SCHEMES, frozen, near


@pytest.fixture(autouse=True)
def operators():
    with npu_operators():
        yield


@pytest.mark.parametrize("smoothed", [False, True], ids=["plain", "smoothed"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_linear_layers_agree_with_the_reference(scheme, dtype, bias, smoothed):
    torch.manual_seed(0)
    layer = frozen(nn.Linear(70, 33, bias).to(dtype), scheme, smoothed)
    fast = optimized(layer, "npu")
    for shape in ((70,), (1, 70), (17, 70), (2, 3, 70), (1, 2, 2, 3, 70), (0, 70)):
        x = 2 * torch.randn(shape).to(dtype)
        if x.numel() or dtype != torch.float32:
            assert near(layer, fast(x), layer(x))
    across = torch.randn(70, 9).to(dtype).t()
    assert near(layer, fast(across), layer(across))
    gelu = nn.functional.gelu(layer(across), approximate="tanh")
    assert torch.allclose(fast(across, gelu="tanh"), gelu, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_TIMESTEP"])
@pytest.mark.parametrize("low", [-1.0, -1.5, -2.99, 0.0])
def test_values_between_two_codes_are_rounded_with_the_zero_point_as_on_the_device(low, scheme, dtype):
    layer = frozen(nn.Linear(4, 3).to(dtype), scheme, extents=[Range(low, low + 3.0)] * 3)
    scale, zero_point = (parameter.view(-1)[:1] for parameter in (layer.input_scale, layer.input_zero_point))
    x = ((torch.arange(-300, 300) + 0.5) * scale).to(dtype).view(-1, 4)
    assert torch.equal(optimized(layer, "npu")(x), layer(x))
    q = torch.ops.npu.npu_quantize(x, scale, zero_point, NUMBERS[torch.qint8])
    assert torch.equal(layer.input.codes(x, 500.0).q, q.float())
    rounded_first = ((x.float() / scale).round() + zero_point).clamp(-128, 127)
    assert torch.equal(q.float(), rounded_first) == (int(zero_point) % 2 == 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rows_with_noise_levels_of_their_own(dtype):
    layer = frozen(nn.Linear(6, 5).to(dtype), "W8A8_TIMESTEP")
    fast, x = optimized(layer, "npu"), torch.randn(3, 4, 6).to(dtype)
    layer.noise_level = fast.noise_level = NoiseLevel.of(torch.tensor([100.0, 900.0, 500.0]))
    assert near(layer, fast(x), layer(x))
    assert near(layer, fast(x[:, 0]), layer(x[:, 0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_convolutions_agree_with_the_reference(scheme, dtype):
    layer = frozen(nn.Conv2d(5, 7, 3, padding=1, stride=2).to(dtype), scheme)
    fast, x = optimized(layer, "npu"), torch.randn(2, 5, 9, 8).to(dtype)
    assert near(layer, fast(x), layer(x))
    assert near(layer, fast(x[0]), layer(x[0]))
