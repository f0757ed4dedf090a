"""Runs the same prompts and noise through a float pipeline and a quantized one, and measures both."""

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
from .meter import Taken, taken
from .probe import Probe


class Drawn(NamedTuple):
    """One run: what it gave, the latents after each step (empty: the pipeline does not show them), what it took."""

    output: np.ndarray
    latents: list[Tensor]
    taken: Taken


class Pair(NamedTuple):
    """A prompt drawn by both: their middle frames, uint8 (1, height, width, 3), and what is reported of it."""

    exact: np.ndarray
    other: np.ndarray
    row: dict[str, Any]


class Comparison:
    """A float pipeline and its quantized form; `pairs` grows with every prompt that is compared."""

    def __init__(
        self,
        pipe: Any,
        deployed: Deployed,
        arguments: Mapping[str, Any],
        seed: int,
        stored: torch.dtype | None = None,
    ) -> None:
        """Prepares a comparison; sizes are counted with float numbers in the dtype `stored`, or in that loaded."""
        shown = output_arguments(inspect.signature(type(pipe).__call__).parameters, pipe)
        self.pipe, self.deployed, self.arguments, self.seed = pipe, deployed, {**arguments, **shown}, seed
        self.device = next(deployed.module.parameters()).device
        self.dtype = next(each.dtype for each in deployed.module.parameters() if each.is_floating_point())
        self.sizes = _sizes(deployed, stored or self.dtype)
        self.probe = Probe(deployed)
        self.lpips = Lpips.find()
        self.pairs: list[Pair] = []
        self._final, self._outputs = Power(), Power()
        self._takes: dict[str, list[Taken]] = {"float": [], "int8": []}

    def look_inside(self, prompt: str) -> None:
        """Runs the float pipeline once with its denoiser probed; what is timed later is then warm.

        Raises MisfitError when the denoiser is not called.
        """
        with self.probe.listening():
            run_prompt(self.pipe, prompt, self.arguments, self.seed, self.probe.clock.tick)
        if not self.probe.powers:
            fact = f"the {self.deployed.component} was never called"
            raise MisfitError(f"{prompt!r}: {fact}. Choose another --component or more --steps.")

    def compare(self, prompt: str) -> Pair:
        """Draws `prompt`, as long a run as the one looked at, with the float denoiser, then with the integers in it."""
        with self.probe.sampling() as power:
            exact = self._draw(prompt, "float")
        other = self._draw(prompt, "int8")
        self._outputs = self._outputs.plus(power)
        errors = [_relative(a, b) for a, b in zip(exact.latents, other.latents, strict=True)]
        if not all(map(math.isfinite, errors)) or not np.isfinite(other.output).all():
            raise NumbersError(f"{prompt!r}: gave values that are not finite. Use another --dtype.")
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
            "output_sqnr": power.sqnr, "seconds": {"float": exact.taken.seconds, "int8": other.taken.seconds},
            **_judged(prompt, a, b),
        }  # fmt: skip
        self.pairs.append(Pair(a[middle].copy(), b[middle].copy(), row))
        return self.pairs[-1]

    def totals(self) -> dict[str, Any]:
        """Numbers over all prompts. None stands for no difference (psnr, sqnr) or for not measured."""
        rows = [pair.row for pair in self.pairs]
        steps = list(zip(*(row["latent_error"] for row in rows), strict=True))
        judged = [row["judged"] for row in rows if "judged" in row]
        right = {side: sum(row[side] for row in judged) for side in ("float", "int8")} | {"of": len(judged)}
        return {
            "psnr": psnr(statistics.fmean(row["mean_square"] for row in rows)),
            "ssim": _mean([row["ssim"] for row in rows]),
            "lpips": _mean([row["lpips"] for row in rows]),
            "lpips_note": self.lpips.note,
            "judged": right if judged else None,
            "output_sqnr": self._outputs.sqnr,
            "output_same": self._outputs.noise == 0.0,
            "latent_sqnr": self._final.sqnr,
            "latent_error": [_spread(step) for step in steps],
            "step_sqnr": [{"step": step + 1, "sqnr": power.sqnr} for step, power in sorted(self.probe.powers.items())],
            "speed": self._speed(),
            "memory": {side: max((t.peak for t in took if t.peak), default=None) for side, took in self._takes.items()},
            "size": self.sizes,
        }

    def _draw(self, prompt: str, side: str) -> Drawn:
        latents: list[Tensor] = []
        inside = self.deployed.installed() if side == "int8" else nullcontext()
        with inside, finite_outputs(self.pipe), taken(self.device) as took:
            made = run_prompt(
                self.pipe, prompt, self.arguments, self.seed,
                on_latents=lambda each: latents.append(each.detach().float().cpu().clone()),
            )  # fmt: skip
        self._takes[side].append(took)
        return Drawn(output_of(made), latents, took)

    def _speed(self) -> dict[str, Any]:
        medians = {side: statistics.median(t.seconds for t in took) for side, took in self._takes.items()}
        pairs = zip(*(self._takes[side] for side in ("float", "int8")), strict=True)
        ratios = [exact.seconds / other.seconds for exact, other in pairs]
        ratio = medians["float"] / medians["int8"]
        return medians | {"ratio": ratio, "ratios": [min(ratios), max(ratios)], "runs": len(ratios)}


def _sizes(deployed: Deployed, dtype: torch.dtype) -> dict[str, Any]:
    """The bytes of both denoisers' numbers, those that both have as floats counted in `dtype`, as files have them."""
    floats = {name for name, tensor in deployed.module.state_dict().items() if tensor.is_floating_point()}

    def counted(module: nn.Module) -> int:
        tensors = {name: each for name, each in module.state_dict().items() if isinstance(each, Tensor)}
        return sum(
            each.numel() * (dtype if name in floats and each.is_floating_point() else each.dtype).itemsize
            for name, each in tensors.items()
        )

    with deployed.installed() as integers:
        other = counted(integers)
    return {"float": counted(deployed.module), "int8": other, "dtype": str(dtype).removeprefix("torch.")}


def _relative(exact: Tensor, other: Tensor) -> float:
    """|other - exact| / |exact|."""
    return float((other - exact).norm() / exact.norm().clamp(min=1e-30))


def _spread(values: tuple[float, ...]) -> dict[str, float]:
    return {"median": statistics.median(values), "smallest": min(values), "largest": max(values)}


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _judged(prompt: str, exact: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """Whether each picture shows what a prompt of the bundled pipeline's world says; {} for any other prompt."""
    if exact.shape != (1, SIZE, SIZE, 3):
        return {}
    try:
        scene = parse(prompt)
    except ValueError:
        return {}
    return {"judged": {"float": judge(exact[0]) == scene, "int8": judge(other[0]) == scene}}
