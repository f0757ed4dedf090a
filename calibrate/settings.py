"""What a calibration can be told, and the named recipes of it."""

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
from .rounding.methods import WEIGHT_METHODS, Method
from .smoothing.search import Group


@dataclass(frozen=True)
class Settings:
    """What a calibration can be told."""

    observer: str = "minmax"  # a name of OBSERVERS
    sigma: float = 25.0  # of observer "sigma"; 0 means minimum and maximum
    symmetric: bool = False  # activations
    reciprocal: bool = False  # scales of inputs are of those that Ascend's graph may multiply with
    activations: str = "static"  # a name of ACTIVATIONS
    smoothing: bool = False
    groups: Callable[[nn.Module], Sequence[Group]] | None = None  # layers that share factors of smoothing
    weights: tuple[str, ...] = ()  # names of WEIGHT_METHODS, of which the best counts; none: round to the nearest
    iterations: Mapping[str, int] = field(default_factory=dict)  # limits by method, where it is not its own
    bias_correction: bool = False
    fallback: int = 0  # layers to leave float: those with the largest output error
    budget: str | None = None  # limits as `budget.budget_of` reads them: a scheme for each layer, by whole runs
    keep_float: tuple[str, ...] = ()  # patterns; each has to match a layer
    defaults: Mapping[str, str] | None = None  # patterns and reasons of a family of models; None: the general rule
    more_float: Mapping[str, str] = field(default_factory=dict)  # patterns and reasons beside the general rule
    quantize: tuple[str, ...] = ()  # patterns of layers that no default keeps float; each has to match one
    samples: int | None = None  # calls to replay; None: all
    sqnr_calls: int | None = None  # calls to measure with, spread over those replayed; None: one of 16, at most 8
    strict: bool = False  # a layer that never ran is an error
    release: bool = False  # the model is ours: its float layers are replaced one by one and let go
    name: str = "keep_float"  # what the user calls `keep_float`, for messages

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
        """How many of `count` calls to measure with; all where layers are to be left float by what is measured."""
        if self.fallback:
            return count
        return min(8, max(1, count // 16)) if self.sqnr_calls is None else self.sqnr_calls

    @property
    def input_type(self) -> type[Input]:
        """How inputs become codes."""
        return ACTIVATIONS[self.activations]

    @property
    def input_scheme(self) -> Scheme:
        """The scheme of the codes of inputs."""
        return replace(SYMMETRIC_ACTIVATION if self.symmetric else ACTIVATION, reciprocal=self.reciprocal)

    @property
    def options(self) -> Options:
        """Those of the observers."""
        return Options(self.sigma, scheme=self.input_scheme)

    @property
    def method(self) -> Method:
        """That of weights and biases."""
        weights = tuple(word for word in self.weights if word != NEAREST)
        return Method(weights, self.iterations, self.bias_correction)

    @property
    def reported(self) -> dict[str, Any]:
        """What report.json says of the settings."""
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
        """The budget as it was read."""
        return None if self.budget is None else budget_of(self.budget)

    @property
    def transforming(self) -> bool:
        """Whether something may happen to inputs before they become codes."""
        return self.smoothing and self.input_type.rounded

    @property
    def surveying(self) -> bool:
        """Whether inputs are looked at more closely than an observer does."""
        return self.smoothing or not self.method.plain or self.input_type.by_level


def _one_of(name: str, word: str, words: Mapping[str, Any]) -> None:
    if word not in words:
        raise UsageError(f"{name}: no '{word}'. Choose one of {', '.join(words)}.")


DEFAULTS = Settings()

# what --accuracy says; docs/accuracy.md has what they cost and bring
_BALANCED: dict[str, Any] = {"smoothing": True, "weights": ("gptq",), "bias_correction": True}
RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "fast": {"smoothing": True},
    "balanced": _BALANCED,
    "best": _BALANCED | {"activations": "dynamic"},
}
