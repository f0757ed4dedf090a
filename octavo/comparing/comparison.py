"""Runs the same prompts and noise through a float pipeline and a quantized one. Measures how much the results differ,
and the seconds and memory of both pipelines."""

import inspect
import math
import statistics
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from octavo.calibrate.replay.sqnr import Power
from octavo.capture.errors import MisfitError, NumbersError
from octavo.pipelines.demo.judge import judge
from octavo.pipelines.demo.scene import SIZE, parse
from octavo.pipelines.finite import finite_outputs
from octavo.pipelines.run import prompt_seed, run_prompt

from ..checkpoints import Deployed
from .image_metrics import as_pixels, mean_square, output_arguments, output_of, psnr, ssim
from .lpips import Lpips
from .meter import Cost, measured
from .probe import Probe


class RunResult(NamedTuple):
    """The result of one run of a pipeline: its output as an array (frames, height, width, channels), the latents after
    each denoising step ([] if the pipeline does not pass latents to a callback), and `cost`, the seconds and the peak
    memory of the run."""

    output: np.ndarray
    latents: list[Tensor]
    cost: Cost


class Pair(NamedTuple):
    """The pictures that the float pipeline (`exact`) and the quantized one (`other`) drew of one prompt, and `row`, a
    dict with the measures of their difference.

    Both pictures are uint8 (1, height, width, 3). Of a video, `exact` and `other` hold the middle frame.
    """

    exact: np.ndarray
    other: np.ndarray
    row: dict[str, Any]


class Comparison:
    """Compares a float pipeline with its quantized form, prompt by prompt. `pairs` has the pictures and measures of
    each prompt compared so far."""

    def __init__(
        self,
        pipe: Any,
        deployed: Deployed,
        arguments: Mapping[str, Any],
        seed: int,
        stored: torch.dtype | None = None,
    ) -> None:
        """Prepares a comparison.

        `deployed` is the float denoiser with its quantized form, `arguments` are the arguments of the pipeline's call,
        and `seed` is the seed of the initial noise. `stored` is the dtype in which the model lies on disk; if it is
        None, the dtype of the loaded model is used. The reported sizes count each element of a float tensor with the
        bytes of this dtype.
        """
        output_type = output_arguments(inspect.signature(type(pipe).__call__).parameters, pipe)
        self.pipe, self.deployed, self.arguments, self.seed = pipe, deployed, {**arguments, **output_type}, seed
        parameters = list(deployed.module.parameters())
        self.device = parameters[0].device
        self.dtype = next(parameter.dtype for parameter in parameters if parameter.is_floating_point())
        self.sizes = _sizes(deployed, stored or self.dtype)
        self.probe = Probe(deployed)
        self.lpips = Lpips.find()
        self.pairs: list[Pair] = []
        self._final, self._outputs = Power(), Power()
        self._costs: dict[str, list[Cost]] = {"float": [], "int8": []}

    def probe_denoiser(self, prompt: str) -> None:
        """Runs the float pipeline on `prompt`. Meanwhile `self.probe` records the largest input value of each layer of
        the denoiser, and the error of the quantized denoiser, which is called with the same arguments as the float
        denoiser. This run also warms up the pipeline, so that the later runs of `compare` can be timed.

        Raises MisfitError if the pipeline never calls the denoiser.
        """
        with self.probe.recording():
            run_prompt(self.pipe, prompt, self.arguments, self.seed, self.probe.clock.tick)
        if not self.probe.powers:
            fact = f"the pipeline never called {self.deployed.component}"
            raise MisfitError(f"{prompt!r}: {fact}. Choose another --component or more --steps.")

    def compare(self, prompt: str) -> Pair:
        """Draws `prompt` with the float denoiser and then with the quantized one, and measures the difference.

        Call `probe_denoiser` once before the first prompt. Raises NumbersError if an output or latents hold NaN or Inf.
        """
        with self.probe.sampling() as power:
            exact = self._draw(prompt, "float")
        other = self._draw(prompt, "int8")
        self._outputs = self._outputs.plus(power)
        errors = [_relative(a, b) for a, b in zip(exact.latents, other.latents, strict=True)]
        if not all(map(math.isfinite, errors)) or not np.isfinite(other.output).all():
            raise NumbersError(f"{prompt!r}: the float or the int8 pipeline computed NaN or Inf. Use another --dtype.")
        if exact.latents:
            self._final.add(exact.latents[-1], other.latents[-1])
        decoded = self.arguments.get("output_type") != "latent"
        a, b = as_pixels(exact.output, other.output, decoded)
        middle = slice(len(a) // 2, len(a) // 2 + 1)
        error = mean_square(a, b)
        row = {
            "prompt": prompt, "seed": prompt_seed(prompt, self.seed), "mean_square": error, "psnr": psnr(error),
            "ssim": ssim(a, b), "lpips": self.lpips.distance(a[middle], b[middle]), "frames": len(a),
            "middle_psnr": psnr(mean_square(a[middle], b[middle])), "latent_error": errors,
            "output_sqnr": power.sqnr, "seconds": {"float": exact.cost.seconds, "int8": other.cost.seconds},
            **_judged(prompt, a, b),
        }  # fmt: skip
        self.pairs.append(Pair(a[middle].copy(), b[middle].copy(), row))
        return self.pairs[-1]

    def totals(self) -> dict[str, Any]:
        """Returns the measures over all prompts compared so far, as JSON-able values.

        A value of None under `psnr` or a key that ends in `sqnr` means that float and quantized results are equal.
        Under any other key it means that the value was not measured.
        """
        rows = [pair.row for pair in self.pairs]
        steps = list(zip(*(row["latent_error"] for row in rows), strict=True))
        judged = [row["judged"] for row in rows if "judged" in row]
        correct = {side: sum(row[side] for row in judged) for side in ("float", "int8")} | {"of": len(judged)}
        return {
            "psnr": psnr(statistics.fmean(row["mean_square"] for row in rows)),
            "ssim": _mean([row["ssim"] for row in rows]),
            "lpips": _mean([row["lpips"] for row in rows]),
            "lpips_note": self.lpips.note,
            "judged": correct if judged else None,
            "output_sqnr": self._outputs.sqnr,
            "output_same": self._outputs.noise == 0.0,
            "latent_sqnr": self._final.sqnr,
            "latent_error": [_median_and_extremes(step) for step in steps],
            "step_sqnr": [{"step": step + 1, "sqnr": power.sqnr} for step, power in sorted(self.probe.powers.items())],
            "speed": self._speed(),
            "memory": {
                side: max((cost.peak for cost in costs if cost.peak), default=None)
                for side, costs in self._costs.items()
            },
            "size": self.sizes,
        }

    def _draw(self, prompt: str, side: str) -> RunResult:
        """Runs the pipeline on `prompt` with the denoiser that `side` names, "float" or "int8", and measures seconds
        and memory."""
        latents: list[Tensor] = []
        denoiser = self.deployed.installed() if side == "int8" else nullcontext()
        with denoiser, finite_outputs(self.pipe), measured(self.device) as cost:
            output = run_prompt(
                self.pipe, prompt, self.arguments, self.seed,
                on_latents=lambda step: latents.append(step.detach().float().cpu().clone()),
            )  # fmt: skip
        self._costs[side].append(cost)
        return RunResult(output_of(output), latents, cost)

    def _speed(self) -> dict[str, Any]:
        """Returns the median seconds per prompt of the float and the int8 pipeline, their ratio (float divided by
        int8), and the smallest and the largest of the ratios of single prompts."""
        medians = {side: statistics.median(cost.seconds for cost in costs) for side, costs in self._costs.items()}
        pairs = zip(*(self._costs[side] for side in ("float", "int8")), strict=True)
        ratios = [exact.seconds / other.seconds for exact, other in pairs]
        ratio = medians["float"] / medians["int8"]
        return medians | {"ratio": ratio, "ratios": [min(ratios), max(ratios)], "runs": len(ratios)}


def _sizes(deployed: Deployed, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the bytes of all tensors of the float and of the quantized denoiser in `deployed`.

    Tensors that are float in both denoisers count with the bytes that they would have in `dtype`, the dtype of the
    model's files. FP8 codes count with one byte.
    """
    floats = {name for name, tensor in deployed.module.state_dict().items() if tensor.is_floating_point()}

    def count_bytes(module: nn.Module) -> int:
        tensors = {name: tensor for name, tensor in module.state_dict().items() if isinstance(tensor, Tensor)}
        cast = {name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.itemsize > 1} & floats
        return sum(
            tensor.numel() * (dtype if name in cast else tensor.dtype).itemsize for name, tensor in tensors.items()
        )

    with deployed.installed() as integers:
        other = count_bytes(integers)
    return {"float": count_bytes(deployed.module), "int8": other, "dtype": str(dtype).removeprefix("torch.")}


def _relative(exact: Tensor, other: Tensor) -> float:
    return float((other - exact).norm() / exact.norm().clamp(min=1e-30))


def _median_and_extremes(values: tuple[float, ...]) -> dict[str, float]:
    return {"median": statistics.median(values), "smallest": min(values), "largest": max(values)}


def _mean(values: list[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return statistics.fmean(numbers) if numbers else None


def _judged(prompt: str, exact: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """Returns whether `exact`, the float picture, and `other`, the int8 picture, show what `prompt` describes:
    {"judged": {"float": True, "int8": True}}.

    Only prompts and pictures of the bundled demo pipeline can be judged. Returns {} for all others.
    """
    if exact.shape != (1, SIZE, SIZE, 3):
        return {}
    try:
        scene = parse(prompt)
    except ValueError:
        return {}
    return {"judged": {"float": judge(exact[0]) == scene, "int8": judge(other[0]) == scene}}
