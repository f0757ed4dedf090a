"""Looks inside a float denoiser while its pipeline runs: ranges of inputs, and what integers do to its outputs."""

import inspect
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from octavo.calibrate.replay.calls import copied_to, device_of, replaced, spread
from octavo.calibrate.replay.hooks import hooked, input_of
from octavo.calibrate.replay.sqnr import Power, tensors_in
from octavo.capture.call_arguments import bind, noise_level
from octavo.capture.recorder import Clock

from ..checkpoints import Deployed

SAMPLED = 8  # calls of a run


class Probe:
    """Statistics that hooks record, by denoising step.

    `maximum`: of each linear layer and convolution, max |x| of its inputs; `powers`: of the denoiser's outputs against
    those of its integer form for the very same inputs.
    """

    def __init__(self, deployed: Deployed) -> None:
        self.clock = Clock()
        self.maximum: dict[str, dict[int, float]] = {}
        self.powers: dict[int, Power] = {}
        self._model, self._deployed = deployed.module, deployed
        self._busy = False  # with the integer form
        self._calls = 0  # of a run

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, every call of the denoiser is looked at, of one run."""
        kinds = (nn.Linear, nn.Conv2d)
        layers = [name for name, module in self._model.named_modules() if isinstance(module, kinds)]
        roots = self._deployed.roots
        before = dict.fromkeys(roots, self._begin) | {name: self._range_of(name) for name in layers}
        with hooked(self._model, before, {root: self._compare(root) for root in roots}):
            yield

    @contextmanager
    def sampling(self) -> Iterator[Power]:
        """Inside, SAMPLED calls, spread over a run as long as the one listened to, are kept; the power is theirs.

        The integer form is given them when the run has ended: what is timed inside has only copied them.
        """
        power, kept, chosen, count = Power(), [], set(spread(self._calls, SAMPLED)), itertools.count()

        def listener(root: str) -> Any:
            def hear(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                if next(count) in chosen:
                    heard = (args, kwargs, tensors_in(output))
                    kept.append((root, replaced(heard, Tensor, lambda each: each.detach().to("cpu", copy=True))))

            return hear

        with hooked(self._model, after={root: listener(root) for root in self._deployed.roots}):
            yield power
        with torch.no_grad(), self._deployed.installed() as integers:
            for root, heard in kept:
                args, kwargs, exact = copied_to(heard, device_of(self._model))
                _add(power, exact, integers.get_submodule(root)(*args, **kwargs))

    def heat(self) -> dict[str, Any]:
        """The ranges as a table: layers in the order in which they ran, a row each, a number or None for each step."""
        steps = sorted({step for row in self.maximum.values() for step in row})
        rows = [[row.get(step) for step in steps] for row in self.maximum.values()]
        return {"layers": list(self.maximum), "steps": [step + 1 for step in steps], "maximum": rows}

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._busy:
            self.clock.observe(noise_level(bind(inspect.signature(module.forward), args, kwargs)[1]))

    def _range_of(self, name: str) -> Any:
        def hear(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._busy:
                x, step = input_of(args, kwargs), self.clock.step
                row = self.maximum.setdefault(name, {})
                row[step] = max(row.get(step, 0.0), float(x.abs().amax()) if x.numel() else 0.0)

        return hear

    def _compare(self, root: str) -> Any:
        def compare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self._busy:
                return
            self._busy = True
            try:
                with torch.no_grad(), self._deployed.installed() as integers:
                    other = integers.get_submodule(root)(*args, **kwargs)
            finally:
                self._busy = False
            self._calls += 1
            _add(self.powers.setdefault(self.clock.step, Power()), tensors_in(output), other)

        return compare


def _add(power: Power, exact: list[Tensor], output: Any) -> None:
    for one, other in zip(exact, tensors_in(output), strict=True):
        power.add(one, other)
