"""Small convolutional networks whose batch norms have statistics, and random options of convolutions."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

CHANNELS = 8


@st.composite
def geometries(draw: Any) -> dict[str, Any]:
    """Draws the options of an nn.Conv2d with CHANNELS input and output channels, for images of at least 9 x 9."""
    kernel = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    same = draw(st.booleans())
    stride = 1 if same else (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    return {
        "kernel_size": kernel, "stride": stride, "padding_mode": mode,
        "padding": "same" if same else (draw(st.integers(0, 2)), draw(st.integers(0, 2))),
        "dilation": (draw(st.integers(1, 2)), draw(st.integers(1, 2))),
        "groups": draw(st.sampled_from([1, 2, 4, CHANNELS])), "bias": draw(st.booleans()),
    }  # fmt: skip


def with_statistics(model: nn.Module, seed: int = 0) -> nn.Module:
    """Puts a model in evaluation mode and gives its batch norms statistics as training might leave them."""
    generator = torch.Generator().manual_seed(seed)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None:
            norm.running_mean.copy_(torch.randn(norm.num_features, generator=generator))
            norm.running_var.copy_(torch.rand(norm.num_features, generator=generator) * 3 + 0.2)
            if norm.affine:
                norm.weight.data.copy_(torch.randn(norm.num_features, generator=generator))
                norm.bias.data.copy_(torch.randn(norm.num_features, generator=generator))
    return model.eval()


class Residual(nn.Module):
    """A residual block: convolution, batch norm, ReLU, convolution and batch norm, added to the input."""

    def __init__(self, first: dict[str, Any], second: dict[str, Any]) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({
            "one": nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, **first), nn.BatchNorm2d(CHANNELS)),
            "two": nn.ModuleList([nn.Conv2d(CHANNELS, CHANNELS, **second), nn.BatchNorm2d(CHANNELS, affine=False)]),
        })  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner["one"](x).relu_()
        for module in self.inner["two"]:
            y = module(y)
        return y + nn.functional.adaptive_avg_pool2d(x, y.shape[-2:])


class Small(nn.Module):
    """A classifier of pictures (batch, 3, 12, 12) in 4 classes, with a stem, depthwise and plain convolutions, and a
    linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS), nn.ReLU())
        depthwise = {"kernel_size": 3, "padding": 1, "groups": CHANNELS, "bias": False}
        self.stages = nn.ModuleList([Residual(depthwise, {"kernel_size": 1}) for _ in range(2)])
        self.head = nn.Linear(CHANNELS, 4)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.stem(pixel_values)
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))


def small(seed: int = 0) -> Small:
    """Returns a Small with frozen random weights."""
    torch.manual_seed(seed)
    return with_statistics(Small(), seed).requires_grad_(False)


def pictures(count: int = 6, batch: int = 4, seed: int = 3) -> list[Tensor]:
    """Returns random batches of pictures for Small."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 3, 12, 12, generator=generator) for _ in range(count)]
