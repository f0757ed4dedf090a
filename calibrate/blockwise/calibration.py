"""Calibrates block by block a model that does not fit in memory. The integers are the same as with
`calibration.calibrate`.

Smoothing, ranges and weight rounding look at one layer, or at layers that share an input, so one block is enough for
them. Each block is calibrated as in `calibration.calibrate`, on calls of the whole model in which only this block has
its weights in memory (blocks.py). All blocks are visited twice, one after the other, in two sweeps: the first sweep
makes float blocks into integer blocks; the second runs the measured calls through the integer blocks.

There are three differences from `calibrate`:
- If a smoothing group has layers in several blocks, the layers of each block get factors of their own, and a warning
  says so.
- There is no learning curve.
- Afterwards the model contains the integer layers. Their tensors are in files in the argument `directory` of
  `BlockwiseCalibration`.
"""

import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from octavo.capture.errors import DeviceError, MisfitError, UsageError
from octavo.capture.ranks import ALONE, Ranks

from ..byte_sizes import size
from ..choice import Choice
from ..error_causes import ErrorCauses, Records, causes_section
from ..guard import Guarded
from ..layers.install import install, names_of
from ..layers.modules import QuantizedLayer
from ..layers.noise_level import attach
from ..layers.scheme import Range
from ..part import calibrate_part, check_any_quantized, check_weights, planned
from ..plan import Plan, block_names
from ..replay.calls import Call, Calls, Progress, calls_at, check_caches, first, silent
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
from .blocks import BlockOutputs, Blocks
from .parking import Cast, Parking, unchanged
from .spill import Spill

_AT_WORK = 2  # memory to calibrate a block, in multiples of its bytes: float weights, and integers with their choices


class _BlockGroup(NamedTuple):
    """The layers of a smoothing group (layers that share smoothing factors) that are in one block. `folds`: the sources
    of the layers' input, into which the factors can be folded. If the group has layers in other blocks too, `folds` is
    empty, because each block then has its own factors, and a source can take only one set of factors."""

    layers: tuple[str, ...]
    folds: tuple[Fold, ...]


class BlockwiseCalibration:
    """Calibrates `model`, whose weights are memory-mapped files, in at most `limit` bytes of resident memory.

    `ranks` are the processes that share the calls of each block. A rank computes a block's outputs only for the calls
    that it needs in the next block: its own share, the calls that the rounding method uses, and the measured calls.

    The files of block outputs and weights are in `directory`, which has to exist until the result is exported. `cast`
    converts a weight to the dtype in which the quantized model will run.
    """

    def __init__(
        self,
        model: nn.Module,
        calls: Calls,
        settings: Settings,
        *,
        directory: Path,
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
        _check_settings(settings)
        check_caches(model)
        self._groups = list(settings.groups(model)) if settings.groups else []
        self._parking = Parking(directory, device or torch.device("cpu"), cast)
        self._plan = self._parking.with_bytes(model, planned(model, settings))
        widest = max((math.prod(entry.shape[1:]) for entry in self._plan.entries if entry.scheme), default=0)
        self._sums = 0 if settings.method.plain else bytes_of_sums(widest, settings.method)
        self._check_shared()
        self._blocks = Blocks(model, self._names, self._parking, Spill(directory), self._plan.quantized)
        self._check_limit()
        # state after the last call, and noise levels of the calls, from the part calibrated last
        self._current, self._timesteps = CurrentCall(model), None
        # positions of calls that this rank runs although another rank owns them; None before the first part
        self._replayed: frozenset[int] | None = None
        self._choices: dict[str, Choice] = {}
        self._ranges: dict[str, list[Range]] = {}
        self._powers: dict[str, Power] = {}
        self._axes: dict[str, int] = {}
        self._layers: dict[str, QuantizedLayer] = {}
        self._guarded: list[Guarded] = []
        self._causes, self._records = None, dict[str, Any]()

    _timesteps: tuple[float, ...] | None
    _causes: ErrorCauses | None
    _records: Records

    def run(self) -> Result:
        """Calibrates all blocks and the layers outside them, and measures the integer model.

        Raises DeviceError if the memory limit is too small; MisfitError if there are no calls, if a call does not fit
        the model, or if blocks change their inputs or remember earlier calls; NumbersError for weights, inputs or
        outputs with NaN or Inf, and if no layer can become integers.
        """
        with self._work.watch.stage("prepare"):
            self._parking.settle(self._model, self._names)
            self._rehearse()
        track = self._blocks.sweep(self._calls, self._calibrate_block, self._wanted)
        exact = self._calibrate_outside(track)
        check_any_quantized(self._plan)
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
        held_out = self._current.held_out_count(self._positions())
        count, guarded = self._current.count, self._guarded
        findings = Findings(self._choices, self._ranges, self._powers, count, output, held_out, guarded)
        report = report_of(self._plan, layers, findings, self._settings, self._work.watch)
        additions: dict[str, Any] = {
            "enough": [],
            "advice": None,
            "warnings": [*report["warnings"], *self._smoothing_warnings()],
        }
        if self._causes:
            additions["causes"] = causes_section(self._causes, self._records, self._plan)
        return Result(self._plan, layers, report | additions, self._timesteps, axes=self._axes, parameters=parameters)

    def _folded(self) -> FoldResult:
        # folding changes the output, whose SQNR was measured before, only in that the scales of the layers that take
        # the factors are rounded again
        layers = {name: self._layers[name] for name in self._plan.quantized}
        if not self._settings.fold or self._settings.groups is None:
            return FoldResult(layers, {})
        return fold(self._model, layers, self._settings.fold_groups(self._model, tuple(layers)))

    def _smoothing_warnings(self) -> Iterator[str]:
        count = sum(len({self._block_of(layer) for layer in group.layers}) > 1 for group in self._groups)
        if count and self._settings.smoothing:
            fact = f"{count} groups of layers span several blocks. With --memory each block has its own factors"
            yield f"smoothing: {fact}, which cannot be folded and stay multipliers of the layers' inputs."

    def _rehearse(self) -> None:
        if next(iter(self._calls()), None) is None:
            raise MisfitError("calls: there are no calls to replay. Give at least one call.")
        self._blocks.rehearse(self._calls())
        self._plan = self._plan.forced_float(self._blocks.used)
        self._check_peak("the first call")

    def _block_of(self, layer: str) -> str | None:
        return next((name for name in self._names if layer.startswith(name + ".")), None)

    def _positions(self) -> list[int]:
        return measured_calls(self._current, self._settings.measured(self._current.count))

    def _measured(self) -> Iterator[Call]:
        return calls_at(self._calls, self._work.ranks.share(self._positions()))

    def _wanted(self, position: int) -> bool:
        # weight rounding and the measurement of the SQNR run the replayed calls; until the first block is calibrated,
        # these are not known, and every call is wanted
        return self._replayed is None or position in self._replayed or self._work.ranks.owns(position)

    def _calibrate_block(self, name: str) -> Callable[[], None]:
        """Calibrates the block `name`; returns a function that puts its integer layers into the model."""
        label = f"{name}, {self._blocks.order.index(name) + 1} of {len(self._blocks.order)}"
        layers = self._calibrate_layers({e.name for e in self._plan.entries if e.name.startswith(name + ".")}, label)
        gc.collect()  # a survey refers to itself, and the collector counts objects, not their bytes
        self._check_peak(name)

        def change() -> None:
            install(self._model, layers)

        return change

    def _calibrate_outside(self, track: BlockOutputs) -> list[list[Tensor]]:
        """Calibrates the layers outside the blocks, while stubs return the blocks' stored outputs, `track`, in place of
        the blocks. Returns the float model's outputs for the measured calls of this rank."""
        outside = {entry.name for entry in self._plan.entries if not self._block_of(entry.name)}
        with self._blocks.ended(self._calls, track):
            layers = self._calibrate_layers(outside, "outside the blocks")
            if self._wanted(0):
                self._blocks.check_end()
            with self._work.watch.stage("measure"):
                exact = outputs(self._model, calls_at(self._blocks.calls, self._positions()), self._work.ranks)
        install(self._model, layers)
        return exact

    def _calibrate_layers(self, names: set[str], label: str) -> dict[str, QuantizedLayer]:
        """Calibrates the layers `names` and returns a dict from name to integer layer. In `self._plan`, the entries of
        layers that cannot become integers change to float. Stores what the report shows of the layers: choices, ranges,
        signal and noise. `label` is shown in front of the progress."""
        plan = Plan(tuple(entry for entry in self._plan.entries if entry.name in names))
        if not plan.quantized:
            return {}
        with self._work.watch.stage("prepare"):
            check_weights(self._model, plan)
        part = calibrate_part(
            self._model, self._blocks.calls, plan, self._settings_for(names), self._work.labelled(label),
            keep_layers=True, sums_memory=self._sums_memory, announce=self._replay,
        )  # fmt: skip
        self._current, self._timesteps = part.selection.observations.current, part.selection.timesteps
        self._plan = self._plan.replaced(part.plan)
        self._ranges |= part.selection.observations.ranges
        self._powers |= part.powers
        self._axes |= part.axes
        self._causes, self._records = part.causes, self._records | part.records
        self._guarded += part.selection.guarded
        # the weights are dropped from the choices: the layers hold them
        self._choices |= {name: replace(choice, weight=None) for name, choice in part.choices.items()}
        self._layers |= part.layers
        return part.layers

    def _replay(self, positions: frozenset[int]) -> None:
        self._replayed = positions

    def _settings_for(self, names: set[str]) -> Settings:
        """Returns the settings with smaller smoothing groups (layers that share smoothing factors): each group keeps
        only its layers that are in `names`, and a group without such layers is left out."""
        parts = [
            _BlockGroup(
                tuple(layer for layer in group.layers if layer in names),
                tuple(group.folds) if names.issuperset(group.layers) else (),
            )
            for group in self._groups
        ]
        return replace(self._settings, groups=lambda _: [part for part in parts if part.layers])

    def _sums_memory(self) -> float:
        """Returns how many bytes the rounding method may use, while calls run, for its sums of products of inputs: the
        memory limit, minus the memory in use now, minus what rounding the widest layer will need after the calls."""
        return self._limit - resident_memory() - SUMS_AT_WORK * self._sums

    def _check_shared(self) -> None:
        """Raises UsageError for a layer that several blocks share. It cannot be calibrated block by block, because its
        integers depend on its inputs in all of these blocks."""
        for layer, names in names_of(self._model).items():
            if layer in self._plan.quantized and len({self._block_of(name) for name in names}) > 1:
                fact = f"several blocks share layer {layer}, which is also {names[-1]}"
                raise UsageError(f"--memory: {fact}. Calibrate without --memory.")

    def _check_limit(self) -> None:
        """Raises DeviceError, before the first call, if the memory limit is too small for the memory that this process
        already uses, the layers outside the blocks, and the calibration of the largest block."""
        whole = self._parking.bytes_of(self._model)
        blocks = [self._parking.bytes_of(self._model.get_submodule(name)) for name in self._names]
        outside = whole - sum(blocks)
        in_use = resident_memory()
        rounding = (1 + SUMS_AT_WORK) * self._sums
        needed = in_use + outside + _AT_WORK * max(blocks) + rounding
        if needed > self._limit:
            fact = (
                f"{size(in_use)} in use, {size(outside)} outside the blocks, {size(_AT_WORK * max(blocks))} for a block"
                + (f", {size(rounding)} to round its widest layer" if rounding else "")
            )
            self._refuse(needed, fact)

    def _check_peak(self, where: str) -> None:
        if (peak := peak_memory()) > self._limit:
            self._refuse(peak, f"the peak so far, reached with {where}")

    def _refuse(self, needed: float, fact: str) -> None:
        raise DeviceError(
            f"--memory {size(self._limit)}: {size(needed)} is needed ({fact}). "
            "Give a larger --memory, or capture smaller pictures."
        )


def _check_settings(settings: Settings) -> None:
    """Raises UsageError for settings that need the whole model in memory."""
    whole = {"--budget": settings.budget is not None or settings.fallback, "--attention": settings.attention != "off"}
    for option in (option for option, given in whole.items() if given):
        raise UsageError(f"--memory: {option} needs the whole model in memory. Remove --memory or {option}.")
