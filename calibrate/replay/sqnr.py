"""Measures the signal-to-quantization-noise ratio (SQNR) of a layer's or a model's integer output.

SQNR = 10 * log10(sum of y_float**2 / sum of (y_float - y_integer)**2)       in dB, over all values measured

Both sums run over all calls before the ratio is taken, so that each call counts by the energy of its signal and of its
error. The mean of the SQNR of single calls would be far higher where a few calls have almost no error.
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

# coefficients of the 97.5 % quantile of Student's t as a polynomial in 1 / degrees of freedom; off by at most 1 % from
# two degrees of freedom on (Abramowitz and Stegun, Handbook of Mathematical Functions, 1964, formula 26.7.5)
_STUDENT = (1.96, 2.372, 2.823, 2.556, 1.587)


@dataclass
class Power:
    """The sums of squares of a float signal (a layer's or a model's output) and of the integer signal's error, from
    which the SQNR follows.

    The sums do not depend on the order in which tensors are added. `count`: the number of values.
    """

    count: int = 0
    _signals: list[float] = field(default_factory=list)  # sum of squares of each tensor, for an exactly rounded total
    _noises: list[float] = field(default_factory=list)

    def add(self, exact: Tensor, other: Tensor) -> None:
        """Adds the squares of `exact`, a tensor of the float model, to the signal, and those of the difference from
        `other`, the integer model's tensor of the same shape, to the noise."""
        self.count += exact.numel()
        signal = exact.to(torch.float32)
        noise = other - signal  # computed in float32, also for an `other` in half precision
        self._signals.append(float(torch.linalg.vector_norm(signal, dtype=torch.float64)) ** 2)
        self._noises.append(float(torch.linalg.vector_norm(noise, dtype=torch.float64)) ** 2)

    def plus(self, other: "Power") -> "Power":
        """Returns the sum of this power and `other`: the signal and noise power over all tensors that were added to
        either."""
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
        """Returns this object, the power of a model's output, unchanged. Raises NumbersError if the output was not
        finite."""
        if math.isfinite(self.signal) and math.isfinite(self.noise):
            return self
        side = "integer" if math.isfinite(self.signal) else "float"
        remedy = "Use --dtype bfloat16 or float32, or keep more layers float with --keep-float."
        raise NumbersError(f"the output of the {side} model has values that are not finite. {remedy}")

    @property
    def mean_square(self) -> float:
        """The mean square of the integer signal's error."""
        return self.noise / self.count if self.count else 0.0

    @property
    def sqnr(self) -> float | None:
        """The SQNR in dB; None where the signal or the error is zero."""
        signal, noise = self.signal, self.noise
        if not (signal > 0.0 and noise > 0.0):
            return None
        return 10.0 * math.log10(signal / noise)


def interval(powers: Sequence[Power]) -> tuple[float, float] | None:
    """Returns the 95 % confidence interval, in dB, of the SQNR over all calls; the measured calls are a sample of all
    calls. `powers` has the signal and noise power of each measured call.

    To first order, a call changes the logarithm of the ratio (summed signal / summed noise) by its share of the signal
    minus its share of the noise. These differences give the standard error (linearized ratio estimator: Cochran,
    Sampling Techniques, 1977, section 6.4). Student's t, with one degree of freedom less than there are calls, gives
    the width. The estimate assumes calls drawn at random. If the calls were picked evenly over noise levels, the
    interval is too wide. If all calls are of one prompt, the interval does not show how prompts differ. Returns None
    for fewer than three calls, and if the signal or the noise is zero.
    """
    count, signal, noise = len(powers), math.fsum(p.signal for p in powers), math.fsum(p.noise for p in powers)
    if count < 3 or not (signal > 0.0 and noise > 0.0):
        return None
    variance = math.fsum((p.signal / signal - p.noise / noise) ** 2 for p in powers) * count / (count - 1)
    middle, half = 10.0 * math.log10(signal / noise), 10.0 / math.log(10.0) * student(count - 1) * variance**0.5
    return middle - half, middle + half


def student(free: int) -> float:
    """Returns the 97.5 % quantile of Student's t for `free` degrees of freedom, off by at most 1 % from two on."""
    return sum(term / free**power for power, term in enumerate(_STUDENT))


@contextmanager
def at_noise_level(layer: QuantizedLayer, noise: NoiseLevel) -> Iterator[None]:
    """Makes the integer layer `layer` use the noise level in `noise` inside the `with` statement. This is for a layer
    that is not part of a denoiser, so that nothing else sets its noise level."""
    before, layer.noise_level = layer.noise_level, noise
    try:
        yield
    finally:
        layer.noise_level = before


@contextmanager
def beside(
    model: nn.Module,
    makers: Mapping[str, Callable[[], QuantizedLayer]],
    see: Callable[[str, nn.Module, QuantizedLayer, Tensor, Tensor, Tensor], Tensor | None],
) -> Iterator[None]:
    """Runs, inside the `with` statement, 8-bit layers beside float layers of `model`, on the same inputs. `makers` is a
    dict from layer name to a function that returns the 8-bit layer, which is made when the float layer runs and freed
    afterwards.

    `see` is called for each input that is not empty, with the name of the layer, the float layer, the 8-bit layer, the
    input, the float output and the output of the 8-bit layer. If it returns a tensor, that is the output of the layer;
    if it returns None, the output stays the float one.
    """

    def hook_for(name: str, make: Callable[[], QuantizedLayer]) -> Callable[..., Tensor | None]:
        def run_beside(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> Tensor | None:
            if not output.numel():
                return None
            layer, x = make(), input_of(args, kwargs)
            with at_noise_level(layer, noise):
                with torch.no_grad():
                    other = layer(x)
                return see(name, module, layer, x, output, other)

        return run_beside

    noise, detach = attach(model)
    try:
        with hooked(model, after={name: hook_for(name, make) for name, make in makers.items()}):
            yield
    finally:
        detach()


@contextmanager
def comparing(
    model: nn.Module, layer_of: Mapping[str, Callable[[], QuantizedLayer]], also: Callable[..., None] | None = None
) -> Iterator[dict[str, Power]]:
    """Compares layers of the float `model` with their integer forms on the same inputs, inside the `with` statement.

    `layer_of` is a dict from layer name to a function that returns the integer layer. Yields a dict from layer name to
    a Power, which sums the signal and the error of the layer's output. `also`, if given, is called for each input with
    the name of the layer, the float layer, the integer layer, the input, the float output and the integer output.
    """
    powers = {name: Power() for name in layer_of}

    def compare(name: str, module: nn.Module, layer: QuantizedLayer, x: Tensor, output: Tensor, other: Tensor) -> None:
        powers[name].add(output, other)
        if also is not None:
            also(name, module, layer, x, output, other)

    with beside(model, layer_of, compare):
        yield powers


def tensors_in(value: Any) -> list[Tensor]:
    """Returns the floating-point tensors in an output (a tensor, a container, or a diffusers output), in the order in
    which the output holds them."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


def outputs(model: nn.Module, calls: Iterable[Call], ranks: Ranks = ALONE) -> list[list[Tensor]]:
    """Runs `model` on those of the `calls` that belong to this rank. Returns, for each of these calls, the
    floating-point tensors in the output, on the CPU."""
    with evaluating(model):
        return [
            [tensor.to("cpu", copy=True) for tensor in tensors_in(run(model, call, position))]
            for position, call in enumerate(calls)
            if ranks.owns(position)
        ]


def joined(powers: Mapping[str, Power], ranks: Ranks) -> dict[str, Power]:
    """Returns `powers`, a dict from layer name to signal and noise power, summed over all ranks. Collective: every rank
    calls this."""
    parts = ranks.gather(dict(powers))
    return {name: reduce(Power.plus, (part[name] for part in parts)) for name in powers}


def powers_of(
    exact: Sequence[Sequence[Tensor]], other: Sequence[Sequence[Tensor]], ranks: Ranks = ALONE
) -> list[Power]:
    """Returns a list with the signal and noise power of each call's output, for the calls of all ranks, rank after
    rank. `exact`: the float model's outputs for the calls of this rank; `other`: the integer model's. Collective: every
    rank calls this."""
    powers = []
    for exact_tensors, other_tensors in zip(exact, other, strict=True):
        powers.append(Power())
        for exact_tensor, other_tensor in zip(exact_tensors, other_tensors, strict=True):
            powers[-1].add(exact_tensor, other_tensor)
    return [power for part in ranks.gather(powers) for power in part]


def power_of(exact: Sequence[Sequence[Tensor]], other: Sequence[Sequence[Tensor]], ranks: Ranks = ALONE) -> Power:
    """Returns the signal and noise power over the outputs of all calls of all ranks. `exact`: the float model's outputs
    for the calls of this rank; `other`: the integer model's. Collective: every rank calls this."""
    return total(powers_of(exact, other, ranks))


def total(powers: Iterable[Power]) -> Power:
    """Adds up `powers`: returns one Power with the signals and the noises of all of them."""
    return reduce(Power.plus, powers, Power())
