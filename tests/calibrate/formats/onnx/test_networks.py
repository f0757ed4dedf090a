"""Ascend's graph of a network computes the same bits as the network, if its float operators round nothing."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from octavo.calibrate.calibration import calibrate_folded
from octavo.calibrate.formats.onnx.ascend_graph import ascend
from octavo.calibrate.formats.onnx.qdq_graph import qdq
from octavo.calibrate.formats.onnx.trace import EXPORTERS, trace
from octavo.calibrate.replay.user_data import Sample

from ....zoo.convolutions import with_statistics
from ....zoo.graphs import integers, on_ascend, on_runtime, step

WIDE = 8


class Block(nn.Module):
    """A depthwise and a pointwise convolution with batch norms.

    The output is concatenated to the input if `beside`, otherwise added to it.
    """

    def __init__(self, wide: int, beside: bool) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        self.norm = nn.BatchNorm2d(wide)
        self.point = nn.Sequential(nn.Conv2d(wide, wide, 1, bias=False), nn.BatchNorm2d(wide, affine=False))
        self.beside = beside

    def forward(self, x: Tensor) -> Tensor:
        y = self.point(self.norm(self.spatial(x)).relu())
        return torch.cat([x, y], 1) if self.beside else nn.functional.relu6(x + y)


class Network(nn.Module):
    """Maps pictures (batch, 3, 16, 16) to outputs (batch, 5).

    The network has residual sums, concatenations, strides, pools and a layer that is used twice.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, WIDE, 3, 2, 1, bias=False), nn.BatchNorm2d(WIDE), nn.ReLU())
        self.first, self.second = Block(WIDE, False), Block(WIDE, True)
        self.down = nn.Conv2d(2 * WIDE, WIDE, 2, 2, padding_mode="circular")
        self.again = nn.Conv2d(WIDE, WIDE, (3, 1), padding="same")
        self.head = nn.Linear(WIDE, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(nn.functional.max_pool2d(self.stem(x), 3, 1, 1)))
        y = self.down(y)
        y = self.again(self.again(y).clamp(-2, 2)) + y
        return self.head(y.amax((2, 3)))


def drawn(count: int, seed: int) -> Tensor:
    """Returns pictures with 17 levels, most of which lie between two codes of some layer."""
    return torch.randint(0, 17, (count, 3, 16, 16), generator=torch.Generator().manual_seed(seed)) / 16


@pytest.mark.parametrize("seed", range(4))
def test_networks(seed):
    torch.manual_seed(seed)
    model = with_statistics(Network(), seed)
    result, folded = calibrate_folded(model, lambda: [Sample((drawn(4, batch),), {}) for batch in range(3)])
    assert len(result.layers) == 8
    assert len(result.report["folded"]) == 5
    traced = trace(folded, result.layers, result.example, exporters=[EXPORTERS[seed % 2]])
    graph, runtime = ascend(traced, result.layers), qdq(traced, result.layers)
    for count in (1, 7):
        x = drawn(count, 9)
        exact = integers(folded, result.layers, x)
        assert np.array_equal(on_ascend(graph, x), exact)
        assert np.abs(on_runtime(runtime, x) - exact).max() <= step(exact)
