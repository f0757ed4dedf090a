"""Reference layers of every scheme for the tests of the runtime, and a check that an output is close to theirs."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.calibrate.layers.inputs import INPUTS, Input, StaticInput, TimestepInput
from octavo.calibrate.layers.modules import QuantizedConv2d, QuantizedLayer, build
from octavo.calibrate.layers.noise_level import NoiseLevel
from octavo.calibrate.layers.scheme import ACTIVATION, QParams, Range, qparams_of

from .toy import nearest

SCHEMES = ("W8A8", "W8A8_DYNAMIC", "W8A8_TIMESTEP", "W8A16")
# Ranges whose zero points are inside the codes, at their lower end and at their upper end.
EXTENTS = (Range(-2.0, 3.0), Range(0.0, 1.0), Range(-5.0, 0.0))


def input_of(scheme: str, dtype: torch.dtype = torch.float32, extents=EXTENTS) -> Input:
    """Returns the input quantization of a layer of this scheme."""
    if not INPUTS[scheme].ranged:
        return INPUTS[scheme]()
    qparams = [qparams_of(extent, ACTIVATION, dtype) for extent in extents]
    if scheme == "W8A8":
        return StaticInput(qparams[0])
    return TimestepInput(QParams(*map(torch.stack, zip(*qparams, strict=True))), torch.tensor([300.0, 700.0]))


def frozen(module: nn.Module, scheme: str, smoothed: bool = False, extents=EXTENTS) -> QuantizedLayer:
    """Returns the reference layer of `module`. A layer of W8A8_TIMESTEP is set to noise level 500."""
    scale = torch.rand(module.weight.shape[1]) + 0.5 if smoothed else None
    input = input_of(scheme, module.weight.dtype, extents)
    layer = build(nearest(module.weight, module.bias, input, multiplier=scale), module)
    layer.noise_level = NoiseLevel.of(torch.tensor(500.0))
    return layer


def near(layer: QuantizedLayer, y: Tensor, wanted: Tensor) -> bool:
    """Returns whether each output equals the reference up to one rounding of its dtype.

    Where the sum nearly cancels the bias and the output is near zero, one rounding of float32 at the bias is allowed
    too.
    """
    assert (y.dtype, y.shape) == (wanted.dtype, wanted.shape)
    bias = torch.zeros(1) if layer.bias is None else layer.bias.detach()
    if isinstance(layer, QuantizedConv2d):
        bias = bias.view(-1, 1, 1)
    eps = torch.finfo(wanted.dtype).eps  # the relative distance of two neighbouring numbers
    allowed = eps * (1 + (wanted.dtype == torch.float32)) * wanted.double().abs() + 2.0**-22 * bias.double().abs()
    return bool(((y.double() - wanted.double()).abs() <= allowed + torch.finfo(wanted.dtype).tiny).all())


def agrees(layer: QuantizedLayer, x: Tensor, y: Tensor, gelu: str | None = None) -> bool:
    """Whether `y` is the output of the reference `layer` for `x`, with GELU of it if asked for, up to one rounding; for
    a layer whose input stays float up to the rounding of sums in float32."""
    wanted = layer(x)
    if gelu is None and not layer.weight_only:
        return near(layer, y, wanted)
    allowed = 2 * torch.finfo(y.dtype).eps * wanted.double().abs() + 2.0**-21  # GELU is at most 1.13 times as steep
    if layer.weight_only:
        positive = copy.deepcopy(layer)
        for tensor in (positive.weight, positive.bias):
            if tensor is not None:
                tensor.abs_()
        allowed += 2.0**-20 * positive(x.double().abs())
    right = wanted.double() if gelu is None else F.gelu(wanted.double(), approximate=gelu)
    return (y.dtype, y.shape) == (wanted.dtype, wanted.shape) and bool(((y.double() - right).abs() <= allowed).all())
