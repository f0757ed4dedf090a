"""Octavo packs weights as oneDNN does, and lets oneDNN pack them where the layout is not certain."""

import ctypes
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from octavo.calibrate.layers.products import sums_in_int32
from octavo.calibrate.runtime import accelerate
from octavo.calibrate.runtime.onednn_layout import Layouts

from ...zoo.runtime_layers import frozen, near

SIDES = (1, 4, 48, 63, 64, 65, 100, 128, 192, 300)


def prepacked(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.onednn.qlinear_prepack(weight, None)


def packed(layouts: Layouts, weight: torch.Tensor) -> torch.Tensor:
    return layouts.pack(weight, weight.sum(1, dtype=torch.int32))


def content(opaque: torch.Tensor) -> bytes:
    return ctypes.string_at(torch.ops.mkldnn.data_ptr(opaque), torch.ops.mkldnn._nbytes(opaque))


def random(outs: int, ins: int) -> torch.Tensor:
    return torch.randint(-128, 128, (outs, ins), dtype=torch.int8)


class Operators(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("outs", SIDES)
def test_any_weight_is_packed_as_onednn_packs_it(outs):
    torch.manual_seed(outs)
    layouts = Layouts()
    for ins in SIDES:
        weights = [random(outs, ins) for _ in range(3)]
        first = torch.randint(-128, 128, (outs * ins + 1,), dtype=torch.int8)[1:].view(outs, ins)  # not word-aligned
        packed_weights = [packed(layouts, weight) for weight in (*weights, first)]
        for weight, opaque in zip((*weights, first), packed_weights, strict=True):
            assert content(opaque) == content(prepacked(weight))
            assert torch.equal(opaque.to_dense().t(), weight)


def test_a_weight_of_zeros_does_not_determine_the_layout_of_its_shape():
    layouts, weight = Layouts(), random(128, 192)
    for tensor in (torch.zeros_like(weight), torch.ones_like(weight), weight, weight):
        assert content(packed(layouts, tensor)) == content(prepacked(tensor))


@pytest.mark.skipif(not (sums_in_int32() and torch.cpu._is_avx512_supported()), reason="another layout")
def test_onednn_packs_one_weight_of_a_shape():
    torch.manual_seed(0)
    model = nn.Sequential(*(frozen(nn.Linear(128, 128), "W8A8") for _ in range(4)))
    x = torch.randn(9, 128)
    wanted = [layer(x) for layer in model]
    accelerate(model)
    with Operators() as counted:
        outputs = [layer(x) for layer in model]
    assert counted.counts["onednn::qlinear_prepack"] == 1
    for layer, y, exact in zip(model, outputs, wanted, strict=True):
        assert near(layer, y, exact)
