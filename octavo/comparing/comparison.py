"""Runs the same prompts and noise through a float pipeline and its quantized forms. Measures how much the results
differ, and the seconds and memory of all pipelines."""

import inspect
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from octavo.capture.errors import MisfitError, NumbersError
from octavo.pipelines.demo.judge import judge
from octavo.pipelines.demo.scene import SIZE, parse
from octavo.pipelines.finite import finite_outputs
from octavo.pipelines.run import prompt_seed, run_prompt

from ..checkpoints import Deployed
from .image_metrics import as_pixels, mean_square, output_arguments, output_of, psnr, ssim
from .meter import Cost, measured
from .perceptual import NAMES, Measured, Perceptual
from .probe import Probe
from .side import Pair, Side

_RATE = 8  # frames per second of a video whose pipeline is called without a rate, as `octavo generate` writes it


class RunResult(NamedTuple):
    """The result of one run of a pipeline: its output as an array (frames, height, width, channels), the latents after
    each denoising step ([] if the pipeline does not pass latents to a callback), and `cost`, the seconds and the peak
    memory of the run."""

    output: np.ndarray
    latents: list[Tensor]
    cost: Cost


class Comparison:
    """Compares a float pipeline with its quantized forms, prompt by prompt. `sides` has the measures and pictures of
    each quantized form."""

    def __init__(
        self,
        pipe: Any,
        deployed: Sequence[Deployed],
        arguments: Mapping[str, Any],
        seed: int,
        stored: torch.dtype | None = None,
    ) -> None:
        """Prepares a comparison.

        `deployed` are quantized forms of the same denoiser, each with the float denoiser; `arguments` are the arguments
        of the pipeline's call, and `seed` is the seed of the initial noise. `stored` is the dtype in which the model
        lies on disk; if it is None, the dtype of the loaded model is used. The reported sizes count each element of a
        float tensor with the bytes of this dtype.

        Raises MisfitError if not all of `deployed` replace the same denoiser.
        """
        output_type = output_arguments(inspect.signature(type(pipe).__call__).parameters, pipe)
        self.pipe, self.arguments, self.seed = pipe, {**arguments, **output_type}, seed
        components = list(dict.fromkeys(item.component for item in deployed))
        if len(components) > 1:
            fact = f"the checkpoints replace different denoisers ({', '.join(components)})"
            raise MisfitError(f"{fact}. Compare them one at a time.")
        parameters = list(deployed[0].module.parameters())
        self.device = parameters[0].device
        self.dtype = next(parameter.dtype for parameter in parameters if parameter.is_floating_point())
        self.probe = Probe(deployed)
        rate = self.arguments.get("fps") or self.arguments.get("frame_rate") or _RATE
        self.perceptual = Perceptual(self.device, float(rate))
        self._floats: list[Cost] = []
        self.sides = [Side(item, stored or self.dtype, self._floats) for item in deployed]

    @property
    def decoded(self) -> bool:
        """Whether the pipeline returns pictures or videos, and not latents."""
        return bool(self.arguments.get("output_type") != "latent")

    def probe_denoiser(self, prompt: str) -> None:
        """Runs the float pipeline on `prompt`. Meanwhile `self.probe` records the largest input value of each layer of
        the denoiser, and the error of the quantized denoisers, which are called with the same arguments as the float
        denoiser. This run also warms up the pipeline, so that the later runs of `compare` can be timed.

        Raises MisfitError if the pipeline never calls the denoiser.
        """
        with self.probe.recording():
            run_prompt(self.pipe, prompt, self.arguments, self.seed, self.probe.clock.tick)
        if not self.probe.calls:
            fact = f"the pipeline never called {self.sides[0].deployed.component}"
            raise MisfitError(f"{prompt!r}: {fact}. Choose another --component or more --steps.")

    def compare(self, prompt: str, number: int = 0) -> list[Pair]:
        """Draws `prompt` with the float denoiser and then with each quantized one, and measures the differences.
        Returns one pair for each of `sides`. `number` is the number of the picture among those of the same prompt, from
        0; each number gives another seed.

        Call `probe_denoiser` once before the first prompt. Raises NumbersError if an output or latents hold NaN or Inf.
        """
        seed = self.seed + number
        with self.probe.sampling() as powers:
            exact = self._draw(prompt, seed, None)
        self._floats.append(exact.cost)
        for side, power in zip(self.sides, powers, strict=True):
            other = self._draw(prompt, seed, side.deployed)
            latents = (exact.latents[-1], other.latents[-1]) if exact.latents else None
            side.add(self._pair(prompt, seed, exact, other, power.sqnr), power, other.cost, latents)
        return [side.pairs[-1] for side in self.sides]

    def totals(self, index: int = 0) -> dict[str, Any]:
        """Returns the measures of the quantized form `index` over all pairs so far (`Side.totals`), and `step_sqnr`:
        the SQNR of the denoiser's output in each denoising step of the first prompt."""
        powers = sorted(self.probe.powers[index].items())
        steps = [{"step": step + 1, "sqnr": power.sqnr} for step, power in powers]
        return self.sides[index].totals() | {"step_sqnr": steps}

    def _pair(self, prompt: str, seed: int, exact: RunResult, other: RunResult, output_sqnr: float | None) -> Pair:
        """Measures the difference between `exact`, the float run, and `other`, the quantized run, both with `prompt`
        and `seed`. `output_sqnr` is the SQNR of the quantized denoiser's output for this prompt, in dB; None if there
        is no error."""
        errors = [_relative(a, b) for a, b in zip(exact.latents, other.latents, strict=True)]
        if not all(map(math.isfinite, errors)) or not np.isfinite(other.output).all():
            fact = "the float or the quantized pipeline computed NaN or Inf"
            raise NumbersError(f"{prompt!r}: {fact}. Use another --dtype.")
        a, b = as_pixels(exact.output, other.output, self.decoded)
        middle = slice(len(a) // 2, len(a) // 2 + 1)
        error = mean_square(a, b)
        seen = self.perceptual.measured(prompt, a, b) if self.decoded else Measured(dict.fromkeys(NAMES), {})
        row = {
            "prompt": prompt, "seed": prompt_seed(prompt, seed), "mean_square": error, "psnr": psnr(error),
            "ssim": ssim(a, b), **seen.values, "text": seen.text, "frames": len(a),
            "middle_psnr": psnr(mean_square(a[middle], b[middle])), "latent_error": errors, "output_sqnr": output_sqnr,
            "seconds": {"float": exact.cost.seconds, "quantized": other.cost.seconds}, **_judged(prompt, a, b),
        }  # fmt: skip
        return Pair(a[middle].copy(), b[middle].copy(), row)

    def _draw(self, prompt: str, seed: int, deployed: Deployed | None) -> RunResult:
        """Runs the pipeline on `prompt`, and measures seconds and memory. The denoiser is the quantized one of
        `deployed`, or the float one if `deployed` is None."""
        latents: list[Tensor] = []
        denoiser = nullcontext() if deployed is None else deployed.installed()
        with denoiser, finite_outputs(self.pipe), measured(self.device) as cost:
            output = run_prompt(
                self.pipe, prompt, self.arguments, seed,
                on_latents=lambda step: latents.append(step.detach().float().cpu().clone()),
            )  # fmt: skip
        return RunResult(output_of(output), latents, cost)


def _relative(exact: Tensor, other: Tensor) -> float:
    return float((other - exact).norm() / exact.norm().clamp(min=1e-30))


def judgeable(prompt: str) -> bool:
    """Returns whether `prompt` describes a scene of the bundled pipeline, whose pictures can be judged."""
    try:
        parse(prompt)
    except ValueError:
        return False
    return True


def _judged(prompt: str, exact: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """Returns whether `exact`, the float picture, and `other`, the quantized picture, show what `prompt` describes:
    {"judged": {"float": True, "quantized": True}}.

    Only prompts and pictures of the bundled demo pipeline can be judged. Returns {} for all others.
    """
    if exact.shape != (1, SIZE, SIZE, 3) or not judgeable(prompt):
        return {}
    scene = parse(prompt)
    return {"judged": {"float": judge(exact[0]) == scene, "quantized": judge(other[0]) == scene}}
