"""Observes a float denoiser with hooks while its pipeline runs: the largest inputs of its layers, and the error of the
quantized denoisers' outputs for the same inputs."""

import inspect
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from octavo.calibrate.replay.calls import copied_to, device_of, evenly_spaced, replaced
from octavo.calibrate.replay.hooks import hooked, input_of
from octavo.calibrate.replay.sqnr import Power, tensors_in
from octavo.capture.call_arguments import bind, noise_level
from octavo.capture.recorder import Clock

from ..checkpoints import Deployed

SAMPLED = 8  # calls of each run that a quantized denoiser computes too; bounds the time and memory of a comparison


class Probe:
    """Records statistics of a float denoiser with hooks while its pipeline runs.

    `maximum[layer][step]` is the largest |x| among the inputs of a linear layer or convolution in a denoising step.
    `powers[form][step]` holds two sums of squares over the calls of a step: of the float denoiser's outputs, and of the
    differences between these outputs and those of one quantized form for the same arguments. The SQNR follows from both
    sums. `calls` counts the calls of the denoiser in the run inside `recording`.
    """

    def __init__(self, deployed: Sequence[Deployed]) -> None:
        """Prepares the records for the quantized forms `deployed`, each of which holds the same float denoiser and a
        quantized form of it."""
        self.clock, self.calls = Clock(), 0
        self.maximum: dict[str, dict[int, float]] = {}
        self.powers: list[dict[int, Power]] = [{} for _ in deployed]
        self._model, self._deployed = deployed[0].module, deployed
        self._busy = False  # True while a quantized denoiser runs: the hooks record nothing then

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Fills `maximum` and `powers` from every call of the denoiser in the body of `with`, which runs the pipeline
        once."""
        kinds = (nn.Linear, nn.Conv2d)
        layers = [name for name, module in self._model.named_modules() if isinstance(module, kinds)]
        roots = self._deployed[0].roots
        before = dict.fromkeys(roots, self._begin) | {name: self._range_of(name) for name in layers}
        with hooked(self._model, before, {root: self._compare(root) for root in roots}):
            yield

    @contextmanager
    def sampling(self) -> Iterator[list[Power]]:
        """While the body of `with` runs the pipeline, copies 8 (SAMPLED) of the denoiser's calls, spaced evenly. To
        space them, the number of calls must be known, so `recording` has to be used before, with a body that makes as
        many calls.

        When the body ends, the quantized denoisers compute the copied calls. The yielded powers, one for each quantized
        form, then get two sums of squares: of the float outputs, and of the quantized denoiser's errors. So only the
        copying adds to the time of the body.
        """
        powers = [Power() for _ in self._deployed]
        samples, chosen, count = [], set(evenly_spaced(self.calls, SAMPLED)), itertools.count()

        def sampler(root: str) -> Any:
            def sample(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                if next(count) in chosen:
                    call = (args, kwargs, tensors_in(output))
                    samples.append((root, replaced(call, Tensor, lambda x: x.detach().to("cpu", copy=True))))

            return sample

        with hooked(self._model, after={root: sampler(root) for root in self._deployed[0].roots}):
            yield powers
        for power, deployed in zip(powers, self._deployed, strict=True):
            with torch.no_grad(), deployed.installed() as integers:
                for root, call in samples:
                    args, kwargs, exact = copied_to(call, device_of(self._model))
                    _add(power, exact, integers.get_submodule(root)(*args, **kwargs))

    def heat(self) -> dict[str, Any]:
        """Returns the largest inputs of all layers in all steps as a table for the heat map, a dict of three lists.
        `layers` has the names of the layers in the order in which they ran, and `steps` the numbers of the denoising
        steps, from 1. `maximum` has a list for each layer, with the layer's largest |input| in each step, or None for a
        step in which the layer did not run."""
        steps = sorted({step for row in self.maximum.values() for step in row})
        rows = [[row.get(step) for step in steps] for row in self.maximum.values()]
        return {"layers": list(self.maximum), "steps": [step + 1 for step in steps], "maximum": rows}

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook that runs before each call of the denoiser. Passes the noise level of the call to `clock`, which
        counts denoising steps."""
        if not self._busy:
            self.clock.observe(noise_level(bind(inspect.signature(module.forward), args, kwargs)[1]))

    def _range_of(self, name: str) -> Any:
        """Returns a hook that records the largest |x| of the inputs of the layer `name`."""

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._busy:
                x, step = input_of(args, kwargs), self.clock.step
                row = self.maximum.setdefault(name, {})
                row[step] = max(row.get(step, 0.0), float(x.abs().amax()) if x.numel() else 0.0)

        return record

    def _compare(self, root: str) -> Any:
        """Returns a hook that runs after each call of a float denoiser. The hook calls the quantized denoisers with the
        same arguments, and adds the squares of the output and of each error to `powers`. If there are several float
        denoisers, one module contains them all, and `root` is the denoiser's name in this module. For a single
        denoiser, `root` is ""."""

        def compare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self._busy:
                return
            self._busy = True
            try:
                for power, deployed in zip(self.powers, self._deployed, strict=True):
                    with torch.no_grad(), deployed.installed() as integers:
                        other = integers.get_submodule(root)(*args, **kwargs)
                    _add(power.setdefault(self.clock.step, Power()), tensors_in(output), other)
            finally:
                self._busy = False
            self.calls += 1

        return compare


def _add(power: Power, exact: list[Tensor], output: Any) -> None:
    for expected, actual in zip(exact, tensors_in(output), strict=True):
        power.add(expected, actual)
