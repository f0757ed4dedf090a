"""A small network and its calls, for the tests of calibration."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from octavo.calibrate.layers.freeze import numbers_of
from octavo.calibrate.layers.inputs import Input
from octavo.calibrate.layers.numbers import Numbers
from octavo.calibrate.layers.transforms import Multiply
from octavo.calibrate.layers.weights import round_to_nearest

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def nearest(
    weight: Tensor, bias: Tensor | None, input: Input, *, multiplier: Tensor | None = None, **more: Tensor | None
) -> Numbers | str:
    """Returns the Numbers of a layer whose weight is rounded to nearest, or the reason why it has none."""
    rounded = round_to_nearest(weight, scheme=input.weights)
    assert rounded is not None
    return numbers_of(rounded, bias, input, weight.dtype, None if multiplier is None else Multiply(multiplier), **more)


class Call(NamedTuple):
    """One call of a network at `step`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    step: int | None = None


class Block(nn.Module):
    """Two linears with a SiLU between them, added to the input."""

    def __init__(self, width: int, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width, bias)
        self.down = nn.Linear(2 * width, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(input=nn.functional.silu(self.up(x)))  # input by keyword, as in AnimateDiff


class Toy(nn.Module):
    """A small transformer: a patch convolution, two blocks, an output layer, and a layer that never runs."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList([Block(width), Block(width, bias=False)])
        self.proj_out = nn.Linear(width, 4)
        self.unused = nn.Linear(4, 4)
        self.table = nn.Parameter(torch.randn(4, 6).t())

    def forward(self, x: Tensor, scale: float = 1.0, extra: dict[str, Any] | None = None) -> Tensor:
        y = self.patch(x).flatten(2).transpose(1, 2) * scale
        for block in self.blocks:
            y = block(y)
        return self.proj_out(y)


def toy(width: int = 16, dtype: torch.dtype = torch.float32, seed: int = 0) -> Toy:
    """Returns a Toy with random weights."""
    torch.manual_seed(seed)
    return Toy(width).to(dtype).eval()


def calls(count: int = 3, dtype: torch.dtype = torch.float32, batch: int = 2) -> list[Call]:
    """Returns random calls of a Toy, one for each step."""
    generator = torch.Generator().manual_seed(7)
    return [
        Call((torch.randn(batch, 3, 4, 5, generator=generator).to(dtype),), {"scale": 1.0 + step, "extra": None}, step)
        for step in range(count)
    ]


def source_of(samples: list[Call]) -> Callable[[], list[Call]]:
    """Returns a function that returns the calls, the form that calibrate takes."""
    return lambda: samples
