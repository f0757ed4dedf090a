"""Measures the effect of each layer's scheme on the final latents of whole runs of the pipeline.

The error of a model is the mean of (latents - float latents)**2 over all values of a few runs. Each group of layers is
switched to each scheme with all other layers float; the errors of groups are assumed to add up, as the errors of
independent roundings do. `mix` runs the mixture chosen on this assumption and reports how far it holds.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from octavo.capture.errors import MisfitError, NumbersError

from ..choice import Choice, layer_of
from ..layers.inputs import Input
from ..layers.install import quantized
from ..layers.modules import QuantizedLayer
from ..plan import Plan, layer_at
from ..replay.calls import evaluating
from ..replay.hooks import hooked
from ..replay.work import Work
from .budget import TIME, Cost, summed
from .knapsack import Option

Trajectory = Callable[[], Sequence[Tensor]]  # runs the pipeline; the same final latents at every call of one model
Assignment = Mapping[str, type[Input]]  # the scheme's input type by layer name; other layers are float


class Candidates:
    """The integer forms of a float model's layers: one for each scheme, made from the choice for the first scheme.

    A weight-only layer gets no multiplier, which MindIE-SD would ignore. Weight-only and dynamic layers get no bias
    correction, which was measured for the first scheme.
    """

    def __init__(self, model: nn.Module, choices: Mapping[str, Choice]) -> None:
        self.model, self._choices = model, choices

    def choice(self, name: str, kind: type[Input]) -> Choice:
        """The choice for a layer whose input becomes codes in the way `kind`."""
        first = self._choices[name]
        if kind.ranged:
            return first
        input = kind(scheme=first.input.scheme)
        if not kind.rounded and first.transform is not None:
            return Choice(input)
        return replace(first, input=input, correction=None)

    def layer(self, name: str, kind: type[Input]) -> QuantizedLayer | str:
        """Makes the integer layer; returns the reason where there is none."""
        return layer_of(layer_at(self.model, name), self.choice(name, kind))

    def layers(self, assignment: Assignment) -> dict[str, QuantizedLayer]:
        """Makes the integer layers of an assignment, without the layers that have no integer form."""
        made = {name: self.layer(name, kind) for name, kind in assignment.items()}
        return {name: layer for name, layer in made.items() if not isinstance(layer, str)}


@dataclass
class Runs:
    """Runs the pipeline with integer layers and compares the latents with the float run; `count` counts the runs."""

    model: nn.Module
    trajectory: Trajectory
    macs: dict[str, int] = field(default_factory=dict)  # multiply-accumulates by layer name, over the float run
    count: int = 0
    _exact: list[Tensor] = field(default_factory=list)

    def begin(self, names: Sequence[str]) -> None:
        """Makes the float run, and counts the multiply-accumulates of the named layers in it.

        Raises MisfitError for a pipeline that never calls the model, NumbersError for latents that are not finite.
        """
        with _counting(self.model, names) as self.macs:
            self._exact = self._latents()
        if not self._exact or not all(bool(each.isfinite().all()) for each in self._exact):
            raise NumbersError("trajectory: the float model's latents are not finite. Use another dtype.")
        if not any(self.macs.values()):
            raise MisfitError("trajectory: it runs no layer of the model. Give the pipeline of this model.")

    def error(self, layers: Mapping[str, QuantizedLayer]) -> float:
        """The mean squared error of the latents with these integer layers; infinite where a latent is not finite."""
        with quantized(self.model, layers):
            made = self._latents()
        pairs = zip(made, self._exact, strict=True)
        noise = sum(float((one - other).square().sum()) for one, other in pairs)
        return noise / sum(each.numel() for each in self._exact) if noise == noise else float("inf")

    @property
    def signal(self) -> float:
        """The mean square of the float latents."""
        return sum(float(each.square().sum()) for each in self._exact) / sum(each.numel() for each in self._exact)

    def _latents(self) -> list[Tensor]:
        self.count += 1
        with evaluating(self.model):
            return [each.detach().to("cpu", torch.float64) for each in self.trajectory()]


@contextmanager
def _counting(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, int]]:
    """Counts multiply-accumulates by layer name while inside."""
    counts = dict.fromkeys(names, 0)

    def hook_for(name: str) -> Callable[..., None]:
        def count(module: nn.Module, args: object, kwargs: object, output: Tensor) -> None:
            counts[name] += output.numel() * module.weight[0].numel()  # type: ignore[index]

        return count

    with hooked(model, after={name: hook_for(name) for name in names}):
        yield counts


def grouped(names: Sequence[str], blocks: Sequence[str], most: int) -> list[tuple[str, ...]]:
    """Divides the layers into at most `most` groups, if possible: each layer alone, else the layers of one part (attn,
    ff) of a block together, else the layers of a block. Layers outside the blocks stay alone."""
    above = {name: next((b for b in blocks if name.startswith(b + ".")), None) for name in names}
    found: list[tuple[str, ...]] = []
    for depth in (None, 1, 0):
        groups: dict[str, list[str]] = {}
        for name, block in above.items():
            key = name
            if block is not None and depth is not None:
                key = ".".join([block, *name[len(block) + 1 :].split(".")[:depth]])
            groups.setdefault(key, []).append(name)
        found = [tuple(group) for group in groups.values()]
        if len(found) <= most:
            break
    return found


@dataclass(frozen=True)
class LayerGroup:
    """Layers that are switched together. `options`: float first, then each scheme that the layers can have; `kinds`:
    the assignment of each option, in which a layer without an integer form of the scheme stays float."""

    names: tuple[str, ...]
    options: tuple[Option, ...]
    kinds: tuple[Assignment, ...]


def float_cost(plan: Plan, macs: Mapping[str, int]) -> dict[str, Cost]:
    """The cost of each layer of a plan as a float, by name; only linears and convolutions take time."""
    return {entry.name: Cost(entry.bytes, float(macs.get(entry.name, 0))) for entry in plan.entries}


def measured(
    candidates: Candidates,
    groups: Sequence[tuple[str, ...]],
    kinds: Sequence[type[Input]],
    before: Mapping[str, Cost],
    runs: Runs,
    work: Work,
) -> list[LayerGroup]:
    """Measures the error and the cost of each option of each group, with one run of the pipeline for each. A scheme
    whose latents are not finite is no option. Collective: the ranks of `work` share the runs."""
    schedule = work.ranks.share([(group, kind) for group in groups for kind in kinds])
    made: dict[tuple[tuple[str, ...], type[Input]], tuple[Option, Assignment]] = {}
    began = runs.count
    for group, kind in work.progress("trajectories", schedule, len(schedule)):
        layers = candidates.layers(dict.fromkeys(group, kind))
        error = runs.error(layers) if layers else float("inf")
        if error < float("inf"):
            cost = summed(cost_of(layers.get(name), before[name]) for name in group)
            made[group, kind] = Option(kind, error, cost), dict.fromkeys(layers, kind)
    parts = work.ranks.gather((runs.count - began, made))
    runs.count = began + sum(count for count, _ in parts)
    every = {key: pair for _, part in parts for key, pair in part.items()}
    found: dict[tuple[str, ...], list[tuple[Option, Assignment]]] = {}
    for group in groups:
        found[group] = [(Option(None, 0.0, summed(before[name] for name in group)), {})]
        found[group] += [every[group, kind] for kind in kinds if (group, kind) in every]
    return [LayerGroup(names, *map(tuple, zip(*pairs, strict=True))) for names, pairs in found.items()]


def cost_of(layer: QuantizedLayer | None, before: Cost) -> Cost:
    """The cost of an integer layer, given its cost `before` as a float; None: the layer stays float."""
    if layer is None:
        return before
    return Cost(sum(tensor.nbytes for tensor in layer.state_dict().values()), before.time * TIME[layer.input_type])
