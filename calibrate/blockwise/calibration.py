"""Calibration of a model that does not fit in memory: block by block, with the same integers.

Every method works within one layer or within layers of one input, so within one block: each block is calibrated as
`calibration.calibrate` does, by calls of the whole model in which only that block has weights (blocks.py). Two sweeps:
over the float blocks, which become integers on the way, and over the integer blocks with the few calls measured.

Differences from `calibrate`: layers of a smoothing group that spans blocks have factors for each block, as a warning
says; there is no learning curve; the model is left with its layers replaced, their numbers in files of `place`.
"""

import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from octavo.capture.errors import DeviceError, MisfitError, UsageError
from octavo.capture.ranks import ALONE, Ranks

from ..byte_sizes import size
from ..choice import Choice
from ..layers.install import install, names_of
from ..layers.modules import QuantizedLayer
from ..layers.noise_level import attach
from ..layers.scheme import Range
from ..part import calibrate_part, check_left, check_weights, planned
from ..plan import Plan, block_names
from ..replay.calls import Call, Calls, Progress, check_caches, first, silent, taken
from ..replay.current_call import CurrentCall
from ..replay.measured_calls import measured_calls
from ..replay.sqnr import Power, outputs, powers_of, total
from ..replay.work import Work
from ..report import Findings, report_of
from ..resources import peak_memory, resident_memory
from ..result import Result
from ..rounding.sums import SUMS_AT_WORK, bytes_of_sums
from ..settings import Settings
from ..smoothing.fold import Fold, FoldResult, fold
from .blocks import Blocks, Track
from .parking import Cast, Parking, unchanged
from .spill import Spill

_AT_WORK = 2  # memory for one block, in multiples of its bytes: its float weights, and its integers with their choices


class _Group(NamedTuple):
    """The layers of a group that are in one block."""

    layers: tuple[str, ...]
    folds: tuple[Fold, ...] = ()


class BlockwiseCalibration:
    """Calibrates `model`, whose weights are parts of mapped files, in at most `limit` bytes of resident memory.

    `ranks` share the observations of each block; each rank runs only the calls through a block that it needs in the
    next block: its own share, and the calls that weights are rounded by.

    `place`: a directory for spilled files, which has to stay until the result is exported. `cast` gives a weight in the
    dtype of the deployment.
    """

    def __init__(
        self,
        model: nn.Module,
        calls: Calls,
        settings: Settings,
        *,
        place: Path,
        limit: float,
        device: torch.device | None = None,
        cast: Cast = unchanged,
        progress: Progress = silent,
        ranks: Ranks = ALONE,
    ) -> None:
        self._model, self._settings, self._limit = model.eval(), settings, limit
        self._work = Work(progress, ranks)
        self._calls = lambda: first(calls, settings.samples)
        self._names = block_names(model)
        if not self._names:
            raise UsageError(f"{type(model).__name__}: has no repeated blocks. Calibrate without --memory.")
        if settings.budget is not None or settings.fallback:
            raise UsageError("--memory: layers are not compared across the model. Leave out --budget.")
        check_caches(model)
        self._groups = list(settings.groups(model)) if settings.groups else []
        self._parking = Parking(place, device or torch.device("cpu"), cast)
        self._plan = self._parking.costs(model, planned(model, settings))
        widest = max((math.prod(entry.shape[1:]) for entry in self._plan.entries if entry.scheme), default=0)
        method = settings.method
        self._sums = 0 if method.plain else bytes_of_sums(widest, method)
        self._check_shared()
        self._blocks = Blocks(model, self._names, self._parking, Spill(place), self._plan.quantized)
        self._check_room()
        self._current, self._timesteps = CurrentCall(model), None  # of the calls: those of the last part
        # positions of calls that this rank runs even where another rank owns them; None until known
        self._replayed: frozenset[int] | None = None
        self._choices: dict[str, Choice] = {}
        self._ranges: dict[str, list[Range]] = {}
        self._powers: dict[str, Power] = {}
        self._axes: dict[str, int] = {}
        self._layers: dict[str, QuantizedLayer] = {}

    _timesteps: tuple[float, ...] | None

    def run(self) -> Result:
        """Calibrates all blocks and measures the integer model.

        Raises OctavoError as `calibration.calibrate` does, and DeviceError where the limit is too small.
        """
        with self._work.watch.stage("prepare"):
            self._parking.settle(self._model, self._names)
            self._rehearse()
        track = self._blocks.sweep(self._calls, self._visited, self._wanted)
        exact = self._finished(track)
        check_left(self._plan)
        with self._work.watch.stage("measure"):
            noise, _ = attach(self._model) if self._timesteps else (None, None)
            for layer in self._layers.values():
                layer.noise_level = noise
            track = self._blocks.sweep(self._measured)
            with self._blocks.ended(self._measured, track):
                output = powers_of(exact, outputs(self._model, self._blocks.calls()), self._work.ranks)
        total(output).checked()
        self._check_peak("measuring")
        layers, parameters = self._folded()
        held = self._current.held_of(self._positions())
        findings = Findings(self._choices, self._ranges, self._powers, self._current.count, output, held)
        report = report_of(self._plan, layers, findings, self._settings, self._work.watch)
        told = {"enough": [], "warnings": [*report["warnings"], *self._divided()]}
        return Result(self._plan, layers, report | told, self._timesteps, axes=self._axes, parameters=parameters)

    def _folded(self) -> FoldResult:
        """The layers, with multipliers folded as in memory. The output was measured before: folding rounds scales of
        the layers that take the factors, and nothing else."""
        layers = {name: self._layers[name] for name in self._plan.quantized}
        if not self._settings.fold or self._settings.groups is None:
            return FoldResult(layers, {})
        return fold(self._model, layers, self._settings.groups(self._model))

    def _divided(self) -> Iterator[str]:
        """Yields one line where layers that should share smoothing factors do not."""
        count = sum(len({self._block_of(layer) for layer in group.layers}) > 1 for group in self._groups)
        if count and self._settings.smoothing:
            fact = f"{count} groups of layers span blocks, which have factors of their own each with --memory"
            yield f"smoothing: {fact}; these stay multipliers of inputs."

    def _rehearse(self) -> None:
        if next(iter(self._calls()), None) is None:
            raise MisfitError("calls: there are none to replay. Give some.")
        self._blocks.rehearse(self._calls())
        self._plan = self._plan.forced_float(self._blocks.used)
        self._check_peak("one call")

    def _block_of(self, layer: str) -> str | None:
        return next((name for name in self._names if layer.startswith(name + ".")), None)

    def _positions(self) -> list[int]:
        """The positions of the calls that the SQNR is measured on."""
        return measured_calls(self._current, self._settings.measured(self._current.count))

    def _measured(self) -> Iterator[Call]:
        """The measured calls that belong to this rank."""
        return taken(self._calls, self._work.ranks.share(self._positions()))

    def _wanted(self, position: int) -> bool:
        return self._replayed is None or position in self._replayed or self._work.ranks.owns(position)

    def _visited(self, name: str) -> Callable[[], None]:
        """Calibrates a block."""
        label = f"{name}, {self._blocks.order.index(name) + 1} of {len(self._blocks.order)}"
        layers = self._calibrated({e.name for e in self._plan.entries if e.name.startswith(name + ".")}, label)
        gc.collect()  # a survey refers to itself, and the collector counts objects, not their bytes
        self._check_peak(name)

        def change() -> None:
            install(self._model, layers)

        return change

    def _finished(self, track: Track) -> list[list[Tensor]]:
        """Calibrates the layers outside the blocks; returns the float model's outputs for the calls measured here."""
        outside = {entry.name for entry in self._plan.entries if not self._block_of(entry.name)}
        with self._blocks.ended(self._calls, track):
            layers = self._calibrated(outside, "outside the blocks")
            if self._wanted(0):
                self._blocks.check_end()
            with self._work.watch.stage("measure"):
                exact = outputs(self._model, taken(self._blocks.calls, self._positions()), self._work.ranks)
        install(self._model, layers)
        return exact

    def _calibrated(self, names: set[str], label: str) -> dict[str, QuantizedLayer]:
        """Calibrates the layers of `names` and returns their integer layers; updates the plan and the findings."""
        plan = Plan(tuple(entry for entry in self._plan.entries if entry.name in names))
        if not plan.quantized:
            return {}
        with self._work.watch.stage("prepare"):
            check_weights(self._model, plan)
        part = calibrate_part(
            self._model, self._blocks.calls, plan, self._settings_for(names), self._work.labelled(label), hold=True,
            room=self._room, announce=self._replay,
        )  # fmt: skip
        self._current, self._timesteps = part.chosen.seen.current, part.chosen.timesteps
        self._plan = self._plan.replaced(part.plan)
        self._ranges |= part.chosen.seen.ranges
        self._powers |= part.powers
        self._axes |= part.axes
        # the integers are in the layers
        self._choices |= {name: replace(choice, weight=None) for name, choice in part.choices.items()}
        self._layers |= part.layers
        return part.layers

    def _replay(self, positions: frozenset[int]) -> None:
        self._replayed = positions

    def _settings_for(self, names: set[str]) -> Settings:
        parts = [_Group(tuple(layer for layer in group.layers if layer in names)) for group in self._groups]
        return replace(self._settings, groups=lambda _: [part for part in parts if part.layers])

    def _room(self) -> float:
        """Bytes left for the sums of GPTQ while GPTQ works on the widest layer."""
        return self._limit - resident_memory() - SUMS_AT_WORK * self._sums

    def _check_shared(self) -> None:
        """Refuses layers that several blocks share: all of their calls decide on their integers."""
        for layer, names in names_of(self._model).items():
            if layer in self._plan.quantized and len({self._block_of(name) for name in names}) > 1:
                fact = f"layer {layer} is in several blocks, as {names[-1]} too"
                raise UsageError(f"--memory: {fact}. Calibrate without --memory.")

    def _check_room(self) -> None:
        """Refuses a limit too small for the layers outside the blocks plus one block at work, before the first call."""
        whole = self._parking.bytes_of(self._model)
        blocks = [self._parking.bytes_of(self._model.get_submodule(name)) for name in self._names]
        outside = whole - sum(blocks)
        used = resident_memory()
        work = (1 + SUMS_AT_WORK) * self._sums
        needed = used + outside + _AT_WORK * max(blocks) + work
        if needed > self._limit:
            fact = (
                f"{size(used)} in use, {size(outside)} outside the blocks, {size(_AT_WORK * max(blocks))} for a block"
                + (f", {size(work)} to round its widest layer" if work else "")
            )
            self._refuse(needed, fact)

    def _check_peak(self, where: str) -> None:
        if (peak := peak_memory()) > self._limit:
            self._refuse(peak, f"reached with {where}")

    def _refuse(self, needed: float, fact: str) -> None:
        raise DeviceError(
            f"--memory {size(self._limit)}: {size(needed)} is needed ({fact}). Give more, or smaller calls."
        )
