"""The settings of a calibration, and its named recipes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from octavo.capture.errors import UsageError

from .choice import NEAREST
from .layers.inputs import ACTIVATIONS, Input
from .layers.scheme import ACTIVATION, SYMMETRIC_ACTIVATION, Scheme
from .mixed_precision.budget import Budget, budget_of
from .observers.observers import OBSERVERS, Options
from .replay.measured_calls import MEASURED
from .rounding.methods import WEIGHT_METHODS, Method
from .smoothing.fold import FoldGroup


@dataclass(frozen=True)
class Settings:
    """The settings of a calibration."""

    observer: str = "minmax"  # a name of OBSERVERS
    sigma: float = 25.0  # of observer "sigma": half width of the range in standard deviations; 0: minimum and maximum
    symmetric: bool = False  # whether activations have zero point 0
    reciprocal: bool = False  # whether input scales are ones that Ascend's graph may multiply with (reciprocals.py)
    activations: str = "static"  # a name of ACTIVATIONS
    smoothing: bool = False
    groups: Callable[[nn.Module], Sequence[FoldGroup]] | None = None  # layers that share smoothing factors
    fold: bool = False  # whether the factors go into what produces the inputs, where groups say how (smoothing/fold.py)
    weights: tuple[str, ...] = ()  # names of WEIGHT_METHODS, of which the best is kept; empty: round to the nearest
    iterations: Mapping[str, int] = field(default_factory=dict)  # limits by method, in place of the method's own
    bias_correction: bool = False
    fallback: int = 0  # layers to leave float: those with the largest output error
    budget: str | None = None  # limits as `budget.budget_of` reads them: a scheme for each layer, by whole runs
    keep_float: tuple[str, ...] = ()  # patterns; each has to match a layer
    defaults: Mapping[str, str] | None = None  # patterns and reasons of a family of models; None: the general rule
    more_float: Mapping[str, str] = field(default_factory=dict)  # patterns and reasons beside the general rule
    quantize: tuple[str, ...] = ()  # patterns of layers that no default keeps float; each has to match one
    samples: int | None = None  # calls to replay; None: all
    sqnr_calls: int | None = None  # calls to measure with; None: MEASURED
    strict: bool = False  # whether a layer that never ran is an error
    release: bool = False  # whether float layers of the model may be replaced one by one and freed
    name: str = "keep_float"  # the user's name of `keep_float`, for messages

    def __post_init__(self) -> None:
        _one_of("observer", self.observer, OBSERVERS)
        for word in self.weights:
            _one_of("weights", word, WEIGHT_METHODS)
        _one_of("activations", self.activations, ACTIVATIONS)
        if not 0.0 <= self.sigma <= 100.0:
            raise UsageError(f"sigma: {self.sigma} is outside 0 to 100. Give a number in it.")
        if self.samples is not None and self.samples < 1:
            raise UsageError(f"samples: {self.samples} is less than 1. Give a positive number.")
        if self.budget is not None:
            budget_of(self.budget)
            if self.fallback:
                raise UsageError("budget: chooses the layers that stay float. Leave amp_num 0.")
            if not self.input_type.ranged:
                raise UsageError(f"budget: mixes schemes with static; activations are {self.activations}. Drop one.")

    def measured(self, count: int) -> int:
        """The number of calls to measure with, out of `count`; all where `fallback` picks layers by their errors."""
        if self.fallback:
            return count
        return MEASURED if self.sqnr_calls is None else self.sqnr_calls

    @property
    def input_type(self) -> type[Input]:
        """The type of inputs: the way in which they become codes."""
        return ACTIVATIONS[self.activations]

    @property
    def input_scheme(self) -> Scheme:
        """The scheme of the codes of inputs."""
        return replace(SYMMETRIC_ACTIVATION if self.symmetric else ACTIVATION, reciprocal=self.reciprocal)

    @property
    def options(self) -> Options:
        """The options of the observers."""
        return Options(self.sigma, scheme=self.input_scheme)

    @property
    def method(self) -> Method:
        """The method for weights and biases."""
        weights = tuple(word for word in self.weights if word != NEAREST)
        return Method(weights, self.iterations, self.bias_correction)

    @property
    def reported(self) -> dict[str, Any]:
        """The settings as report.json shows them."""
        return {
            "observer": self.observer,
            "sigma": self.sigma,
            "percentile": self.options.percentile,
            "symmetric": self.symmetric,
            "activations": self.activations,
            "smoothing": self.smoothing,
            "weights": list(self.weights) or [NEAREST],
            "iterations": dict(self.iterations),
            "bias_correction": self.bias_correction,
            "fallback": self.fallback,
            "budget": self.budget,
            "keep_float": list(self.keep_float),
            "samples": self.samples,
        }

    @property
    def limits(self) -> Budget | None:
        """The budget as limits; None without one."""
        return None if self.budget is None else budget_of(self.budget)

    @property
    def transforming(self) -> bool:
        """Whether something may happen to inputs before they become codes."""
        return self.smoothing and self.input_type.rounded

    @property
    def surveying(self) -> bool:
        """Whether a survey of the inputs is needed: for smoothing, rounding methods, or bins of noise levels."""
        return self.smoothing or not self.method.plain or self.input_type.by_level


def _one_of(name: str, word: str, words: Mapping[str, Any]) -> None:
    if word not in words:
        raise UsageError(f"{name}: no '{word}'. Choose one of {', '.join(words)}.")


DEFAULTS = Settings()

# settings by the names of --accuracy; docs/accuracy.md has their costs and gains
_BALANCED: dict[str, Any] = {"smoothing": True, "weights": ("gptq",), "bias_correction": True}
RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "fast": {"smoothing": True},
    "balanced": _BALANCED,
    "best": _BALANCED | {"activations": "dynamic"},
}
