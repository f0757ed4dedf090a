"""ResNet-18 and ResNet-50 in plain torch (He et al., Deep residual learning for image recognition, 2015).

In a bottleneck the 3 x 3 convolution has the stride, as in torchvision.
"""

from torch import Tensor, nn


def conv_norm(inputs: int, outputs: int, size: int, stride: int = 1) -> list[nn.Module]:
    """Returns a convolution, which divides the size by its stride alone, and a batch norm."""
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class Block(nn.Module):
    """Two 3 x 3 convolutions, or a bottleneck of 1 x 1, 3 x 3 and 1 x 1, added to the input."""

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        outputs = 4 * width if bottleneck else width
        layers = conv_norm(inputs, width, 3, stride)
        if bottleneck:
            layers = [*conv_norm(inputs, width, 1), nn.ReLU(True), *conv_norm(width, width, 3, stride)]
        self.residual = nn.Sequential(*layers, nn.ReLU(True), *conv_norm(width, outputs, 1 if bottleneck else 3))
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(*conv_norm(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return (self.residual(x) + self.shortcut(x)).relu_()


class ResNet(nn.Module):
    """A classifier of pictures (batch, 3, height, width). Returns logits (batch, classes)."""

    def __init__(self, depths: tuple[int, ...], bottleneck: bool, width: int = 64, classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_norm(3, width, 7, 2), nn.ReLU(True), nn.MaxPool2d(3, 2, 1))
        blocks: list[nn.Module] = []
        inputs = width
        for stage, depth in enumerate(depths):
            for index in range(depth):
                blocks.append(Block(inputs, width << stage, 2 if stage and not index else 1, bottleneck))
                inputs = (width << stage) * (4 if bottleneck else 1)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def resnet18(**options: int) -> ResNet:
    """Builds ResNet-18, with 11.7 million parameters."""
    return ResNet((2, 2, 2, 2), False, **options)


def resnet50(**options: int) -> ResNet:
    """Builds ResNet-50, with 25.6 million parameters."""
    return ResNet((3, 4, 6, 3), True, **options)
