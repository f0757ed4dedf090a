"""Signal-to-quantization-noise ratio of a layer's or a model's output against the float output.

SQNR = 10 * log10(sum of y_float**2 / sum of (y_float - y_integer)**2)       in dB, over all values observed

The sums run over all calls before the ratio is taken, so that a call counts by the energy of its signal and of its
error. A mean over the SQNR of each call would be far higher where a few calls have next to no error.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from octavo.capture.errors import NumbersError
from octavo.capture.ranks import ALONE, Ranks

from ..layers.modules import QuantizedLayer
from ..layers.noise_level import NoiseLevel, attach
from .calls import Call, evaluating, run
from .hooks import hooked, input_of

# 97.5 % quantile of Student's t: terms by powers of one over the degrees of freedom; within 1 % from two degrees on
# (Abramowitz and Stegun, Handbook of Mathematical Functions, 1964, formula 26.7.5)
_STUDENT = (1.96, 2.372, 2.823, 2.556, 1.587)


@dataclass
class Power:
    """Sums of squares of a float signal and of the integer signal's error, the same for any order of the tensors.

    `count`: the number of values.
    """

    count: int = 0
    _signals: list[float] = field(default_factory=list)  # sums of squares of each tensor, added later without rounding
    _noises: list[float] = field(default_factory=list)

    def add(self, exact: Tensor, other: Tensor) -> None:
        """Adds the float tensor `exact` and the integer model's tensor `other`, of the same shape; changes neither."""
        self.count += exact.numel()
        signal = exact.to(torch.float32)
        noise = other - signal  # in float32, whatever the dtype of `other`
        self._signals.append(float(torch.linalg.vector_norm(signal, dtype=torch.float64)) ** 2)
        self._noises.append(float(torch.linalg.vector_norm(noise, dtype=torch.float64)) ** 2)

    def plus(self, other: "Power") -> "Power":
        """The power of the tensors of both."""
        return Power(self.count + other.count, self._signals + other._signals, self._noises + other._noises)

    @property
    def signal(self) -> float:
        """The sum of squares of the float signal."""
        return math.fsum(self._signals)

    @property
    def noise(self) -> float:
        """The sum of squares of the integer signal's error."""
        return math.fsum(self._noises)

    def checked(self) -> "Power":
        """Returns this power of a model's output. Raises NumbersError where the output was not finite everywhere."""
        if math.isfinite(self.signal) and math.isfinite(self.noise):
            return self
        side = "integer" if math.isfinite(self.signal) else "float"
        remedy = "Use --dtype bfloat16 or float32, or keep more layers float with --keep-float."
        raise NumbersError(f"the output of the {side} model has values that are not finite. {remedy}")

    @property
    def mean_square(self) -> float:
        """The mean square of the error."""
        return self.noise / self.count if self.count else 0.0

    @property
    def sqnr(self) -> float | None:
        """The SQNR in dB; None without signal or without noise."""
        signal, noise = self.signal, self.noise
        if not (signal > 0.0 and noise > 0.0):
            return None
        return 10.0 * math.log10(signal / noise)


def interval(powers: Sequence[Power]) -> tuple[float, float] | None:
    """The 95 % confidence interval, in dB, of the SQNR that calls like these have; `powers` holds one power a call.

    To first order the logarithm of a ratio of sums moves by each call's share of one sum less that of the other: these
    differences give the standard error (linearized ratio estimator: Cochran, Sampling Techniques, 1977, section 6.4).
    Student's t, with one degree of freedom less than there are calls, gives the width. The calls count as drawn at
    random; calls spread over noise levels vary less, and calls of one prompt do not show how prompts differ. None for
    fewer than three calls, and without an SQNR.
    """
    count, signal, noise = len(powers), math.fsum(p.signal for p in powers), math.fsum(p.noise for p in powers)
    if count < 3 or not (signal > 0.0 and noise > 0.0):
        return None
    variance = math.fsum((p.signal / signal - p.noise / noise) ** 2 for p in powers) * count / (count - 1)
    free = count - 1
    student = sum(term / free**power for power, term in enumerate(_STUDENT))
    middle, half = 10.0 * math.log10(signal / noise), 10.0 / math.log(10.0) * student * variance**0.5
    return middle - half, middle + half


@contextmanager
def at_noise_level(layer: QuantizedLayer, noise: NoiseLevel) -> Iterator[None]:
    """Gives a layer outside any model this noise level while inside."""
    before, layer.noise_level = layer.noise_level, noise
    try:
        yield
    finally:
        layer.noise_level = before


@contextmanager
def comparing(model: nn.Module, layer_of: Mapping[str, Callable[[], QuantizedLayer]]) -> Iterator[dict[str, Power]]:
    """Compares each named layer of the float `model` with its integer form on the very same inputs while inside."""
    powers = {name: Power() for name in layer_of}

    def hook_for(power: Power, make: Callable[[], QuantizedLayer]) -> Callable[..., None]:
        def compare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            if output.numel():
                layer = make()
                with at_noise_level(layer, noise):
                    power.add(output, layer(input_of(args, kwargs)))

        return compare

    noise, detach = attach(model)
    try:
        with hooked(model, after={name: hook_for(powers[name], make) for name, make in layer_of.items()}):
            yield powers
    finally:
        detach()


def tensors_in(value: Any) -> list[Tensor]:
    """The floating-point tensors in an output (a tensor, a container, or a diffusers output), in order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


def outputs(model: nn.Module, calls: Iterable[Call], ranks: Ranks = ALONE) -> list[list[Tensor]]:
    """The outputs of `model`, on the CPU, for each of the `calls` that `ranks` gives to this process."""
    with evaluating(model):
        return [
            [tensor.to("cpu", copy=True) for tensor in tensors_in(run(model, call, position))]
            for position, call in enumerate(calls)
            if ranks.owns(position)
        ]


def joined(powers: Mapping[str, Power], ranks: Ranks) -> dict[str, Power]:
    """The powers summed over all ranks. Collective."""
    parts = ranks.gather(dict(powers))
    return {name: reduce(Power.plus, (part[name] for part in parts)) for name in powers}


def powers_of(
    exact: Sequence[Sequence[Tensor]], other: Sequence[Sequence[Tensor]], ranks: Ranks = ALONE
) -> list[Power]:
    """The power of a model's outputs in each of the same calls, which `ranks` share. Collective."""
    powers = []
    for exact_tensors, other_tensors in zip(exact, other, strict=True):
        powers.append(Power())
        for exact_tensor, other_tensor in zip(exact_tensors, other_tensors, strict=True):
            powers[-1].add(exact_tensor, other_tensor)
    return [power for part in ranks.gather(powers) for power in part]


def power_of(exact: Sequence[Sequence[Tensor]], other: Sequence[Sequence[Tensor]], ranks: Ranks = ALONE) -> Power:
    """The power of a model's outputs on the same calls, which `ranks` share. Collective."""
    return total(powers_of(exact, other, ranks))


def total(powers: Iterable[Power]) -> Power:
    """The power of the tensors of all."""
    return reduce(Power.plus, powers, Power())
