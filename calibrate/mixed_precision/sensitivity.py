"""Measures the effect of each layer's scheme on the final latents of whole runs of the pipeline.

The error of a model is the mean of (latents - float latents)**2 over all final latents that a `Trajectory`, one run of
the pipeline, returns. Each group of layers is switched to each scheme while all other layers stay float. The search
assumes that the errors of groups add up, as errors of independent roundings do; `mix` runs the chosen mixture and
reports its measured error and the sum of the errors of its groups.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from octavo.capture.errors import MisfitError, NumbersError

from ..choice import Choice, layer_of
from ..layers.inputs import INPUTS, RULES, Input, StaticInput, TimestepInput
from ..layers.install import quantized
from ..layers.modules import QuantizedLayer
from ..layers.scheme import Range, qparams_of
from ..plan import Plan, layer_at
from ..replay.calls import evaluating
from ..replay.hooks import hooked
from ..replay.work import Work
from .budget import TIME, Cost, summed
from .knapsack import Option

Trajectory = Callable[[], Sequence[Tensor]]  # runs the pipeline, returns its final latents, the same for the same model
Assignment = Mapping[str, str]  # name of the scheme by layer name; all other layers are float


class Candidates:
    """Makes 8-bit layers of any scheme from `choices`: a dict from layer name to the smoothing, quantized weight and
    bias correction that calibration chose for the scheme in the settings. For another element type, the weight is
    rounded to the nearest, and the range of the input is what the lowest and the highest code stand for in the
    settings' scheme.

    Weight-only layers get no smoothing factors, which MindIE-SD, a runtime for Ascend, would ignore. Weight-only and
    dynamic layers get no bias correction, because corrections were measured for the scheme of the calibration.
    """

    def __init__(self, model: nn.Module, choices: Mapping[str, Choice]) -> None:
        self.model, self._choices = model, choices

    def choice(self, name: str, scheme: str) -> Choice | str:
        """Returns how the layer `name` is quantized with the scheme called `scheme`: how its input becomes codes, its
        smoothing, quantized weight and bias correction. Returns a text with the reason if the layer cannot have this
        scheme."""
        first = self._choices[name]
        if first.input.name == scheme:
            return first
        input = input_for(first.input, scheme, layer_at(self.model, name).weight.dtype)
        if isinstance(input, str):
            return input
        same_codes = input.weights == first.input.weights
        if not input.rounded and first.transform is not None:
            return Choice(input)
        return replace(first, input=input, correction=None, weight=first.weight if same_codes else None)

    def layer(self, name: str, scheme: str) -> QuantizedLayer | str:
        """Returns the 8-bit layer for the layer `name` with the scheme of the name `scheme`; or a text with the reason
        why there is none."""
        choice = self.choice(name, scheme)
        return choice if isinstance(choice, str) else layer_of(layer_at(self.model, name), choice)

    def choices(self, assignment: Assignment) -> dict[str, Choice]:
        """Returns a dict from layer name to how the layer is quantized, for the layers in `assignment`. Layers without
        an 8-bit form are left out."""
        choices = {name: self.choice(name, scheme) for name, scheme in assignment.items()}
        return {name: choice for name, choice in choices.items() if not isinstance(choice, str)}

    def layers(self, assignment: Assignment) -> dict[str, QuantizedLayer]:
        """Returns a dict from layer name to integer layer for the layers in `assignment`, a dict from layer name to
        scheme. Layers without an integer form are left out."""
        layers = {name: self.layer(name, scheme) for name, scheme in assignment.items()}
        return {name: layer for name, layer in layers.items() if not isinstance(layer, str)}


def input_for(input: Input, scheme: str, dtype: torch.dtype) -> Input | str:
    """Returns the `Input`, the way in which the input of a layer becomes codes, for the scheme called `scheme`. It is
    made from `input`, the way in which the layer's input becomes codes in another scheme. `dtype` is that of stored
    scales. Returns a text with the reason if the layer cannot have this scheme."""
    kind, rule = INPUTS[scheme], RULES[scheme]
    rule = input.scheme if rule.element == input.scheme.element else replace(rule, per_tensor=input.scheme.per_tensor)
    if not kind.ranged:
        return kind(scheme=rule)
    if not isinstance(input, StaticInput) or kind is TimestepInput:
        return "its ranges are not known beforehand, or not for each noise level"
    scale, zero_point = float(input.qparams.scale), int(input.qparams.zero_point)
    extent = Range((input.scheme.qmin - zero_point) * scale, (input.scheme.qmax - zero_point) * scale)
    qparams = qparams_of(extent, rule, dtype)
    return "no scale can represent its range" if qparams is None else StaticInput(qparams, scheme=rule)


@dataclass
class Runs:
    """Runs the pipeline with integer layers and compares its final latents with those of a run with the float model.
    `trajectory` runs the pipeline, whose denoiser is `model`, and returns its final latents. `macs` is a dict from
    layer name to the number of multiply-accumulates in the float run, `count` the number of runs so far."""

    model: nn.Module
    trajectory: Trajectory
    macs: dict[str, int] = field(default_factory=dict)  # multiply-accumulates by layer name, over the float run
    count: int = 0
    _exact: list[Tensor] = field(default_factory=list)

    def begin(self, names: Sequence[str]) -> None:
        """Runs the float pipeline, and counts the multiply-accumulates of the layers `names`. Call this before `error`.

        Raises MisfitError for a pipeline that runs none of these layers, and NumbersError for latents that are not
        finite.
        """
        with _counting(self.model, names) as self.macs:
            self._exact = self._latents()
        if not self._exact or not all(bool(latents.isfinite().all()) for latents in self._exact):
            raise NumbersError(
                "the float pipeline's final latents have NaN or Inf. Load the pipeline in another dtype (--dtype)."
            )
        if not any(self.macs.values()):
            raise MisfitError(
                "the pipeline of `trajectory` calls no layer of this model. Run the pipeline that contains the model."
            )

    def error(self, layers: Mapping[str, QuantizedLayer]) -> float:
        """Returns the mean squared error of the final latents when `layers` replace the float layers of the same names;
        infinite if a latent is not finite."""
        with quantized(self.model, layers):
            latents = self._latents()
        pairs = zip(latents, self._exact, strict=True)
        noise = sum(float((latent - exact).square().sum()) for latent, exact in pairs)
        return noise / sum(tensor.numel() for tensor in self._exact) if noise == noise else float("inf")

    @property
    def signal(self) -> float:
        """The mean square of the float pipeline's final latents."""
        return sum(float(tensor.square().sum()) for tensor in self._exact) / sum(
            tensor.numel() for tensor in self._exact
        )

    def _latents(self) -> list[Tensor]:
        self.count += 1
        with evaluating(self.model):
            return [latents.detach().to("cpu", torch.float64) for latents in self.trajectory()]


@contextmanager
def _counting(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, int]]:
    """Counts the multiply-accumulates of the layers `names` inside the `with` statement. Yields a dict from layer name
    to the count so far."""
    counts = dict.fromkeys(names, 0)

    def hook_for(name: str) -> Callable[..., None]:
        def count(module: nn.Module, args: object, kwargs: object, output: Tensor) -> None:
            counts[name] += output.numel() * module.weight[0].numel()  # type: ignore[index]

        return count

    with hooked(model, after={name: hook_for(name) for name in names}):
        yield counts


def divide_layers(names: Sequence[str], blocks: Sequence[str], most: int) -> list[tuple[str, ...]]:
    """Divides the layers `names` into groups that change their scheme together, at most `most` groups if possible.
    `blocks` are the names of the model's blocks.

    If there are at most `most` layers, each is a group of its own. Otherwise the layers of one submodule of a block,
    such as attn or ff, are a group. If these are still too many groups, all layers of a block are a group, even if that
    gives more than `most` groups. Each layer outside the blocks is always a group of its own.
    """
    block_of = {name: next((prefix for prefix in blocks if name.startswith(prefix + ".")), None) for name in names}
    divided: list[tuple[str, ...]] = []
    for depth in (None, 1, 0):
        groups: dict[str, list[str]] = {}
        for name, block in block_of.items():
            key = name
            if block is not None and depth is not None:
                key = ".".join([block, *name[len(block) + 1 :].split(".")[:depth]])
            groups.setdefault(key, []).append(name)
        divided = [tuple(group) for group in groups.values()]
        if len(divided) <= most:
            break
    return divided


@dataclass(frozen=True)
class LayerGroup:
    """Layers that change their scheme together.

    `options`: first the option that all these layers stay float, then an option for each scheme that was measured.
    `assignments`: for each option, a dict from layer name to the name of its scheme. A layer without an 8-bit
    form is not in the dict and stays float.
    """

    names: tuple[str, ...]
    options: tuple[Option, ...]
    assignments: tuple[Assignment, ...]


def float_cost(plan: Plan, macs: Mapping[str, int]) -> dict[str, Cost]:
    """Returns a dict from the name of each layer in the plan to its cost as a float layer. The time is the layer's
    number of multiply-accumulates in `macs`; it is 0 for a layer not in `macs`, which the pipeline never runs."""
    return {entry.name: Cost(entry.bytes, float(macs.get(entry.name, 0))) for entry in plan.entries}


def measure_groups(
    candidates: Candidates,
    groups: Sequence[tuple[str, ...]],
    schemes: Sequence[str],
    before: Mapping[str, Cost],
    runs: Runs,
    work: Work,
) -> list[LayerGroup]:
    """Runs the pipeline once for each group of layers and each scheme, with all other layers float. Returns the groups
    with the error of the final latents and the cost of the group for each scheme; leaves out a scheme of a group if it
    gives latents that are not finite. `schemes` are the names of the schemes, `before` has the cost of each layer as
    float. `candidates` makes the integer layers, `runs` runs the pipeline.

    Collective: the ranks of `work` share the runs.
    """
    schedule = work.ranks.share([(group, scheme) for group in groups for scheme in schemes])
    results: dict[tuple[tuple[str, ...], str], tuple[Option, Assignment]] = {}
    began = runs.count
    for group, scheme in work.progress("trajectories", schedule, len(schedule)):
        layers = candidates.layers(dict.fromkeys(group, scheme))
        error = runs.error(layers) if layers else float("inf")
        if error < float("inf"):
            cost = summed(cost_of(layers.get(name), before[name]) for name in group)
            results[group, scheme] = Option(scheme, error, cost), dict.fromkeys(layers, scheme)
    parts = work.ranks.gather((runs.count - began, results))
    runs.count = began + sum(count for count, _ in parts)
    measured = {key: pair for _, part in parts for key, pair in part.items()}
    pairs_by_group: dict[tuple[str, ...], list[tuple[Option, Assignment]]] = {}
    for group in groups:
        pairs_by_group[group] = [(Option(None, 0.0, summed(before[name] for name in group)), {})]
        pairs_by_group[group] += [measured[group, scheme] for scheme in schemes if (group, scheme) in measured]
    return [LayerGroup(names, *map(tuple, zip(*pairs, strict=True))) for names, pairs in pairs_by_group.items()]


def cost_of(layer: QuantizedLayer | None, before: Cost) -> Cost:
    """Returns the bytes and the estimated time of the integer layer `layer`. `before` has the bytes and the time of
    the float layer that it replaces. If `layer` is None, the layer stays float, and `before` is returned."""
    if layer is None:
        return before
    return Cost(sum(tensor.nbytes for tensor in layer.state_dict().values()), before.time * TIME[layer.input_type])
