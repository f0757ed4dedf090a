"""The settings of a calibration, and the recipes of `--accuracy`."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from octavo.capture.errors import UsageError

from .choice import NEAREST
from .layers.inputs import ACTIVATIONS, INPUTS, Input
from .layers.scheme import ACTIVATION, ELEMENT_TYPES, INT8, SYMMETRIC_ACTIVATION, Scheme
from .layers.schemes import NAMES, ROTATIONS, WEIGHT_SCALES, Instead
from .mixed_precision.budget import Budget, budget_of
from .observers.observers import OBSERVERS, Options
from .replay.measured_calls import MEASURED
from .rounding.methods import WEIGHT_METHODS, Method
from .smoothing.fold import FoldGroup, Unfolded, fixed_scales

# the words of `Settings.rotation`, with the numbers of channels in a group that are tried; the first is preferred
ROTATION = {"off": (), "auto": (256, 64, 16), **{str(size): (size,) for size in ROTATIONS}}
ATTENTION = ("off", "report", "write")
WHOLE_NUMBER_METHODS = ("admm", "adaround")  # rounding methods whose codes are whole numbers


@dataclass(frozen=True)
class Settings:
    """The settings of a calibration. The comment behind each field describes the field; docs/accuracy.md says how much
    accuracy each setting brings."""

    observer: str = "minmax"  # how ranges are observed: a name of OBSERVERS
    sigma: float = 25.0  # for observer "sigma": half width of the range in standard deviations; 0: minimum and maximum
    symmetric: bool = False  # whether activations have zero point 0
    reciprocal: bool = False  # whether multiplying by 1 / input scale must give the same codes (layers/reciprocals.py)
    activations: str = "static"  # how inputs become codes: a name of ACTIVATIONS
    element: str = "int8"  # the numbers that codes are taken from: a name of ELEMENT_TYPES
    weight_scales: str = "channel"  # what has a scale in a weight: a word of WEIGHT_SCALES
    instead: tuple[Instead, ...] = ()  # what a layer may get whose scheme would lose it (guard.py); else it stays float
    joined: tuple[tuple[str, ...], ...] = ()  # layers whose weights share one scale, with weight_scales "tensor"
    clamping: bool = False  # whether scales of MXFP8 inputs are chosen as Ascend does (`Scheme.clamping`)
    smoothing: bool = False  # whether inputs are divided by smoothing factors where that lowers the error
    rotation: str = "off"  # whether inputs are rotated where that lowers the error: a name of ROTATION
    groups: Callable[[nn.Module], Sequence[FoldGroup]] | None = None  # returns the smoothing groups of a model
    fold: bool = False  # whether factors are folded into the layers that produce the inputs (smoothing/fold.py)
    multipliers: bool = True  # whether factors that are not folded may multiply inputs at run time
    weights: tuple[str, ...] = ()  # names of WEIGHT_METHODS: each layer takes the best; empty: round to the nearest
    iterations: Mapping[str, int] = field(default_factory=dict)  # limits by method; others use the method's own limit
    bias_correction: bool = False  # whether biases are corrected by the mean error of the integer output
    attention: str = "off"  # a word of ATTENTION: whether errors of quantized attention are reported, and types written
    explain: bool = False  # whether the report says what causes the errors of layers (error_causes.py)
    fallback: int = 0  # number of layers that stay float: those with the largest output error
    budget: str | None = None  # limits in the form of `budget.budget_of`; schemes are then chosen by running a pipeline
    mixable: tuple[str, ...] | None = None  # schemes that layers may have beside each other; None: all
    keep_float: tuple[str, ...] = ()  # patterns of layers that stay float; each has to match a layer
    defaults: Mapping[str, str] | None = None  # the family's patterns of float layers, with reasons; None: general rule
    more_float: Mapping[str, str] = field(default_factory=dict)  # more such patterns, beside the general rule
    quantize: tuple[str, ...] = ()  # patterns of layers to quantize despite a default; each has to match a layer
    samples: int | None = None  # number of calls to replay; None: all
    sqnr_calls: int | None = None  # number of calls to measure the SQNR on; None: MEASURED
    # returns which of the layers with these names a format can only hold as float; None: the formats hold all
    only_float: Callable[[nn.Module, Collection[str]], Mapping[str, str]] | None = None
    strict: bool = False  # whether a layer that never ran is an error
    release: bool = False  # whether integer layers may replace the model's float layers one by one, to free memory
    name: str = "keep_float"  # the user's name of the option `keep_float`, for messages

    def __post_init__(self) -> None:
        _one_of("observer", self.observer, OBSERVERS)
        for word in self.weights:
            _one_of("weights", word, WEIGHT_METHODS)
        _one_of("activations", self.activations, ACTIVATIONS)
        _one_of("rotation", self.rotation, ROTATION)
        _one_of("attention", self.attention, dict.fromkeys(ATTENTION))
        _one_of("element", self.element, ELEMENT_TYPES)
        _one_of("weight_scales", self.weight_scales, dict.fromkeys(WEIGHT_SCALES))
        self._check_element()
        if not 0.0 <= self.sigma <= 100.0:
            raise UsageError(f"sigma: {self.sigma} is outside 0 to 100. Give a number from 0 to 100.")
        if self.samples is not None and self.samples < 1:
            raise UsageError(f"samples: {self.samples} is less than 1. Give a positive number.")
        if self.budget is not None:
            budget_of(self.budget)
            if self.fallback:
                raise UsageError("budget: the budget itself decides which layers stay float. Set amp_num to 0.")
            if not self.input_type.ranged:
                fact = f"needs inputs with fixed ranges, but activations are {self.activations}"
                raise UsageError(f"budget: {fact}. Use static activations, or no budget.")

    def _check_element(self) -> None:
        """Raises UsageError for settings that do not fit the element type."""
        ways = NAMES[self.element]
        if self.activations not in ways:
            fact = f"{self.element} has no {self.activations} activations"
            raise UsageError(f"activations: {fact}. Use {next(iter(ways))}.")
        if self.element == INT8.name:
            return
        unfit = [word for word in self.weights if word in WHOLE_NUMBER_METHODS]
        if unfit:
            fact = f"rounds to whole numbers, but the codes of {self.element} are floating-point numbers"
            raise UsageError(f"weights: '{unfit[0]}' {fact}. Use gptq or easy-quant.")
        if self.weight_scales == "tensor" and ELEMENT_TYPES[self.element].block is not None:
            raise UsageError(f"weight_scales: a weight in {self.element} has a scale for each block. Use 'channel'.")

    def measured(self, count: int) -> int:
        """Returns the number of calls on which the SQNR is measured, when `count` calls are replayed. This is `count`
        with `fallback`, the setting by which the layers with the largest output error stay float. Otherwise it is
        `sqnr_calls`, or 16 (MEASURED) if `sqnr_calls` is None; a number above `count` means all calls."""
        if self.fallback:
            return count
        return MEASURED if self.sqnr_calls is None else self.sqnr_calls

    def keeping(self, reasons: Mapping[str, str]) -> "Settings":
        """Returns the settings with further layers that stay float: the keys of `reasons`, a dict from layer name to
        the reason."""
        if self.defaults is None:
            return replace(self, more_float={**reasons, **self.more_float})
        return replace(self, defaults={**reasons, **self.defaults})

    @property
    def input_type(self) -> type[Input]:
        """The subclass of `Input` that says how inputs become codes, such as the one for a range of each token. It
        follows from the setting `activations`."""
        return ACTIVATIONS[self.activations]

    @property
    def input_scheme(self) -> Scheme:
        """The rule by which inputs become codes. The settings `symmetric` and `reciprocal` decide whether the zero
        point is 0, and whether multiplying by 1 / scale has to give the same codes as dividing by scale; FP8 codes have
        no zero point."""
        scheme, per_tensor = SYMMETRIC_ACTIVATION, self.weight_scales == "tensor"
        if self.element != INT8.name:
            element = ELEMENT_TYPES[self.element]
            clamping = self.clamping and element.block is not None
            return replace(scheme, element=element, per_tensor=per_tensor, clamping=clamping)
        scheme = scheme if self.symmetric else ACTIVATION
        return replace(scheme, reciprocal=self.reciprocal, per_tensor=per_tensor)

    @property
    def scheme(self) -> str:
        """The name of the scheme that quantized layers get, such as W8A8_FP8_DYNAMIC."""
        return NAMES[self.element][self.activations]

    def fold_groups(self, model: nn.Module, quantized: Collection[str]) -> list[FoldGroup]:
        """Returns the smoothing groups of `model`. `quantized` are the names of its 8-bit layers. Smoothing factors
        cannot be folded into such a layer if its output channels share a scale, or if its scales are powers of two. A
        group whose input such a layer produces is returned as `Unfolded`."""
        groups = list(self.groups(model)) if self.groups else []
        if not fixed_scales(self.input_scheme):
            return groups
        return [
            Unfolded(tuple(group.layers)) if any(fold.target in quantized for fold in group.folds) else group
            for group in groups
        ]

    @property
    def options(self) -> Options:
        """The options of the observers, which find the ranges of inputs."""
        return Options(self.sigma, scheme=self.input_scheme)

    @property
    def method(self) -> Method:
        """The rounding methods and the bias correction that these settings ask for."""
        weights = tuple(word for word in self.weights if word != NEAREST)
        return Method(weights, self.iterations, self.bias_correction)

    @property
    def reported(self) -> dict[str, Any]:
        """The settings as they are written to report.json."""
        return {
            "observer": self.observer,
            "sigma": self.sigma,
            "percentile": self.options.percentile,
            "symmetric": self.symmetric,
            "activations": self.activations,
            "element": self.element,
            "weight_scales": self.weight_scales,
            "smoothing": self.smoothing,
            "rotation": self.rotation,
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
        """The limits of `budget` on bytes and time; None without a budget."""
        return None if self.budget is None else budget_of(self.budget)

    @property
    def mixture(self) -> tuple[str, ...]:
        """The schemes that a budget chooses from: that of the settings, and those of its element type and of int8 that
        have no timestep bins, as far as `mixable` allows. If the scheme of the settings has timestep bins, static
        schemes are left out too."""
        elements = dict.fromkeys((self.element, INT8.name))
        names = [NAMES[element].get(way) for element in elements for way in ("static", "dynamic", "float")]
        allowed = [name for name in names if name and (self.mixable is None or name in self.mixable)]
        if self.input_type.by_level:
            allowed = [name for name in allowed if not INPUTS[name].ranged]
        return tuple(dict.fromkeys((self.scheme, *allowed)))

    @property
    def transforming(self) -> bool:
        """Whether inputs may be transformed (smoothed or rotated) before they become codes."""
        return (self.smoothing or bool(self.rotations)) and self.input_type.rounded

    @property
    def rotations(self) -> tuple[int, ...]:
        """The sizes of the groups of channels that a rotation may mix, such as 16 or 64; empty: no input is rotated."""
        return ROTATION[self.rotation]

    @property
    def surveying(self) -> bool:
        """Whether a replay has to survey the inputs: to record statistics of each channel and a sample of the rows.
        Smoothing, rotation, rounding methods, timestep bins and the guard need the survey."""
        needed = self.transforming or self.smoothing or not self.method.plain
        return needed or self.input_type.by_level or self.guarding

    @property
    def guarding(self) -> bool:
        """Whether layers that their scheme would lose get another one, or stay float (guard.py)."""
        return self.element != INT8.name and self.input_type.rounded


def _one_of(name: str, word: str, words: Mapping[str, Any]) -> None:
    if word not in words:
        raise UsageError(f"{name}: '{word}' is unknown. Choose one of {', '.join(words)}.")


DEFAULTS = Settings()

# settings of each recipe of --accuracy; docs/accuracy.md lists what each costs and gains
_BALANCED: dict[str, Any] = {"smoothing": True, "weights": ("gptq",), "bias_correction": True}
RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "fast": {"smoothing": True},
    "balanced": _BALANCED,
    "best": _BALANCED | {"activations": "dynamic"},
}
