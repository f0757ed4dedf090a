"""Splits the squared error of each quantized layer into its causes: rounding and clipping, of the input and the weight.

The float layer computes W0 x0, the quantized layer W2 x2, where x0 and W0 are the input and weight after the layer's
transform, and x2 and W2 the values of their codes. Between them lie x1 and W1, in which values beyond the codes are
clipped but nothing is rounded. With the means Wm = (W0 + W2) / 2 and xm = (x0 + x2) / 2, exactly

    W2 x2 - W0 x0  =  Wm (x2 - x1)  +  Wm (x1 - x0)  +  (W2 - W1) xm  +  (W1 - W0) xm
                      input rounding   input clipping   weight rounding  weight clipping

So the effect of a factor is the mean of its effects with the other factor in float and in codes: its Shapley value
(Shapley, A value for n-person games, 1953), and no interaction is left over. What the layer's error e has beyond this
sum is the rest: bias correction, and the rounding of biases, scales and outputs. The share of a cause is the inner
product of its effect and e. Shares add up to the squared error; a cause that reduces the error of others has a negative
one.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .layers.inputs import StaticInput, TimestepInput
from .layers.modules import QuantizedLayer, QuantizedLinear
from .layers.noise_level import NoiseLevel, bins_of
from .layers.scheme import QParams, Scheme, in_float32
from .layers.transforms import weight_for
from .layers.weights import decoded, spread
from .observers.ranges import edges_of
from .plan import FloatLayer, Plan
from .replay.calls import Call
from .replay.current_call import CurrentCall
from .replay.work import Work

# kinds of layers, each with a pattern of layer names; a layer is of the first kind whose pattern is found in its name
LAYER_KINDS = {
    "modulation": r"(^|\.)(\w*norm\w*\.linear|time_emb_proj|emb_layers|\w*modulation\w*|\w*_mod)(\.|$)",
    "embedding": r"embed",
    "attention, output": r"(^|\.)(to_out|to_add_out|out_proj)(\.|$)|attn\w*\.(proj|o|out)$",
    "attention, input": r"(^|\.)(to_(q|k|v|kv|qkv\w*)|qkv|(add_)?[qkv]_proj|(q|k|v|kv)_linear|attn\w*\.[qkv])(\.|$)",
    "feed-forward": r"(^|\.)(ff\w*|ffn|\w*mlp\w*|feed_?forward\w*|fc\d)(\.|$)",
}
CAUSES = ("input rounding", "input clipping", "weight rounding", "weight clipping", "rest")


class Sums(NamedTuple):
    """The squared error of one layer on one input, and its causes. `signal`: the sum of squares of the layer's float
    output. `error`: the sum of squares of the difference between quantized and float output. `shares`: the part of
    `error` that each of CAUSES has, in the order of CAUSES."""

    signal: float
    error: float
    shares: tuple[float, ...]


Records = dict[str, dict[int, list[Sums]]]  # by layer name and bin: the sums of each call


class ErrorCauses:
    """Sums up the causes of the layers' errors over those of the measured calls that are held out, or over all measured
    calls if none is held out. `current` has the noise level of each calibration call, and which calls are held out;
    `positions` are the positions of the measured calls among the calibration calls."""

    def __init__(self, current: CurrentCall, positions: Sequence[int], work: Work) -> None:
        indices, self.held_out = current.held_out_or_all(positions)
        self._positions, self._calls = positions, {positions[index] for index in indices}
        self._levels, self._work = current.levels, work
        self.edges = edges_of(current.levels.values())
        self._bin: int | None = None
        self.records: Records = {}

    @property
    def count(self) -> int:
        """The number of calls that errors are split on."""
        return len(self._calls)

    def tracked(self, calls: Iterable[Call]) -> Iterator[Call]:
        """Yields the measured `calls`. Notes for each call, before it is yielded, the bin of its noise level, to which
        `add` then adds. So the caller has to run a call before it asks for the next."""
        for position, call in zip(self._positions, calls, strict=True):
            level = torch.tensor(self._levels.get(position, 0.0))
            self._bin = int(bins_of(level, self.edges)) if position in self._calls else None
            yield call

    def add(
        self, name: str, module: FloatLayer, layer: QuantizedLayer, x: Tensor, exact: Tensor, other: Tensor
    ) -> None:
        """Adds the causes of the error of the layer `name` on its input `x` in the call that `tracked` yielded last;
        adds nothing if errors are not split on this call. `exact` is the output of the float layer `module`, `other`
        that of the quantized `layer`, whose noise level has to be set to that of the call."""
        if self._bin is not None:
            sums = causes_of(module, layer, x, exact, other)
            self.records.setdefault(name, {}).setdefault(self._bin, []).append(sums)

    def joined(self) -> Records:
        """Returns the records of all ranks joined: for each layer and bin of noise levels, the sums of all calls.
        Collective: every rank calls this."""
        joined: Records = {}
        for part in self._work.ranks.gather(self.records):
            for name, bins in part.items():
                for index, sums in bins.items():
                    joined.setdefault(name, {}).setdefault(index, []).extend(sums)
        return joined


@torch.no_grad()
def causes_of(module: FloatLayer, layer: QuantizedLayer, x: Tensor, exact: Tensor, other: Tensor) -> Sums:
    """Returns the squared error of `layer` on the input `x`, split into its causes, and the sum of squares of `exact`,
    the output of the float layer `module`. `other` is the output of `layer`."""
    error = (other - exact.to(torch.float32)).to(torch.float32)
    w0, w1, w2 = _weights(module, layer)
    x0, x1, x2 = _inputs(layer, x)
    middle, mean = (w0 + w2) / 2, (x0 + x2) / 2
    pairs = ((x2 - x1, middle), (x1 - x0, middle), (mean, w2 - w1), (mean, w1 - w0))
    shares = [
        _inner(_product(layer, *pair), error) if bool(pair[0].any()) and bool(pair[1].any()) else 0.0 for pair in pairs
    ]
    squares = _inner(error, error)
    signal = exact.to(torch.float32)
    return Sums(_inner(signal, signal), squares, (*shares, squares - math.fsum(shares)))


def _inner(one: Tensor, other: Tensor) -> float:
    # row by row in float32, then in float64, which not every device has
    rows = (one * other).flatten(0, -2).sum(-1) if one.ndim > 1 else one * other
    return math.fsum(rows.tolist())


def _weights(module: FloatLayer, layer: QuantizedLayer) -> tuple[Tensor, Tensor, Tensor]:
    """Returns three forms of the layer's weight after the transform, all float32: not quantized; clipped to the range
    of the codes, but not rounded; and the values that the codes stand for."""
    exact = weight_for(layer.transform, module.weight).to(torch.float32)
    scale = spread(decoded(layer.weight_scale), layer.weight)
    clipped = _clipped(exact, scale, torch.zeros_like(scale), layer.input.weights)
    return exact, clipped, in_float32(layer.weight.detach()) * scale


def _inputs(layer: QuantizedLayer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns three forms of the input `x` after the transform, all float32: not quantized; clipped to the range of the
    codes, but not rounded; and the values that the codes stand for."""
    linear = isinstance(layer, QuantizedLinear)
    x = layer.transformed(x, -1 if linear else -3)
    exact = x.to(torch.float32)
    if layer.weight_only:
        return exact, exact, exact
    input, axes = layer.input, (-1,) if linear else (-3, -2, -1)
    if isinstance(input, TimestepInput):
        rows = len(x) if x.ndim > (1 if linear else 3) else None
        static = input.in_bins((layer.noise_level or NoiseLevel()).bins(input.edges, rows))
        shape = [-1, *[1] * (x.ndim - 1)] if static.qparams.scale.ndim else []
        qparams = QParams(*(parameter.view(shape) for parameter in static.qparams))
        input = StaticInput(qparams, scheme=input.scheme)
    codes = input.codes(x, axes=axes)
    zero_point = torch.zeros_like(codes.scale) if codes.zero_point is None else codes.zero_point.to(torch.float32)
    rule = input.scheme if layer.calibrated else input.weights
    return exact, _clipped(exact, codes.scale, zero_point, rule), (codes.q - zero_point) * codes.scale


def _clipped(x: Tensor, scale: Tensor, zero_point: Tensor, rule: Scheme) -> Tensor:
    """Returns `x` with values outside the range of the codes of `rule` replaced by the value of the lowest or highest
    code. A value that is outside by no more than half the distance of the two outermost codes is not replaced, because
    its error counts as rounding and not as clipping."""
    margin = (0.5 if rule.element.integer else 16.0) * scale
    low, high = (rule.qmin - zero_point) * scale, (rule.qmax - zero_point) * scale
    return torch.where((x < low - margin) | (x > high + margin), x.clamp(low, high), x)


def _product(layer: QuantizedLayer, x: Tensor, weight: Tensor) -> Tensor:
    """Returns the product or convolution of `x` and `weight`, both float32, in the shape of the output of `layer`."""
    if isinstance(layer, QuantizedLinear):
        return F.linear(x, weight)
    padded = layer.geometry.padded(x, 0.0)
    return F.conv2d(padded, weight, None, layer.stride, 0, layer.dilation, layer.groups)


def layer_kind(name: str, kind: str) -> str:
    """Returns the kind of a layer for the report: "convolution" for a Conv2d; otherwise the first key of LAYER_KINDS
    whose pattern is found in the layer's `name`, such as "feed-forward", or "other" if there is none. `kind` is the
    name of the layer's class, such as "Linear"."""
    if kind == "Conv2d":
        return "convolution"
    return next((word for word, pattern in LAYER_KINDS.items() if re.search(pattern, name)), "other")


def causes_section(causes: ErrorCauses, records: Records, plan: Plan) -> dict[str, Any]:
    """Returns the entry `causes` of report.json. Errors and shares are relative to the sum of squares of a layer's
    float output; those of several layers are means over the layers, so that every layer counts as much as another.

    | key      | content                                                                                            |
    |----------|----------------------------------------------------------------------------------------------------|
    | calls    | the number of calls that errors were split on; held_out: whether these are held out                |
    | names    | the names of the causes, in the order of shares                                                    |
    | layers   | a row for each layer: name, kind, error, shares                                                    |
    | kinds    | a row for each kind of layers: kind, layers (their number), error, shares                          |
    | levels   | a row for each bin of noise levels: low, high (null: no bound), layers, error, shares              |
    """
    rows = [
        {"name": entry.name, "kind": layer_kind(entry.name, entry.kind), **_row(records[entry.name].values())}
        for entry in plan.entries
        if entry.scheme and entry.name in records
    ]
    records = {row["name"]: records[row["name"]] for row in rows}
    kinds = {kind: [row for row in rows if row["kind"] == kind] for kind in dict.fromkeys(row["kind"] for row in rows)}
    ends = [None, *causes.edges.tolist(), None]
    levels = [
        {"low": ends[index], "high": ends[index + 1], **_mean(parts)}
        for index in range(len(ends) - 1)
        if (parts := [_row([bins[index]]) for bins in records.values() if index in bins])
    ]
    return {
        "calls": causes.count, "held_out": causes.held_out, "names": list(CAUSES), "layers": rows,
        "kinds": [{"kind": kind, **_mean(parts)} for kind, parts in kinds.items()], "levels": levels,
    }  # fmt: skip


def _row(parts: Iterable[Iterable[Sums]]) -> dict[str, Any]:
    """Returns a dict of the layer's `error` and of its `shares`, one for each cause: the sums over all of `parts`,
    divided by the sum of squares of the layer's float output."""
    sums = [item for part in parts for item in part]
    signal = math.fsum(item.signal for item in sums) or 1.0
    shares = [math.fsum(item.shares[index] for item in sums) / signal for index in range(len(CAUSES))]
    return {"error": math.fsum(item.error for item in sums) / signal, "shares": shares}


def _mean(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns a dict of the means of `error` and `shares` over `rows`, one row for each layer, and the number of rows
    as `layers`."""
    shares = [math.fsum(row["shares"][index] for row in rows) / len(rows) for index in range(len(CAUSES))]
    return {"layers": len(rows), "error": math.fsum(row["error"] for row in rows) / len(rows), "shares": shares}
