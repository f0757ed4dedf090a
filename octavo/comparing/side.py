"""Collects the measures of one quantized form of a pipeline over all pairs of pictures, and their 95 % intervals."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from octavo.calibrate.replay.sqnr import Power, total
from octavo.capture.tensors import dtype_name

from ..checkpoints import Deployed
from .image_metrics import psnr
from .intervals import Interval, ratio_interval, share_interval
from .meter import Cost
from .perceptual import NAMES

_MEANS = ("ssim", *NAMES)  # measures whose total is the mean over pairs


class Pair(NamedTuple):
    """The pictures that the float pipeline (`exact`) and the quantized one (`other`) drew of one prompt, and `row`, a
    dict with the measures of their difference.

    Both pictures are uint8 (1, height, width, 3). Of a video, `exact` and `other` hold the middle frame.
    """

    exact: np.ndarray
    other: np.ndarray
    row: dict[str, Any]


class Side:
    """One quantized form of the pipeline in a comparison. `pairs` has the pictures and measures of each pair so far.

    `deployed` is the quantized denoiser with the float one, `dtype` the dtype of the model on disk, and `floats` the
    costs of the runs of the float pipeline, which all sides share.
    """

    def __init__(self, deployed: Deployed, dtype: torch.dtype, floats: Sequence[Cost]) -> None:
        self.deployed, self.sizes = deployed, sizes(deployed, dtype)
        self.pairs: list[Pair] = []
        self._final, self._powers = Power(), list[Power]()
        self._quantized_costs: list[Cost] = []
        self._costs: dict[str, Sequence[Cost]] = {"float": floats, "quantized": self._quantized_costs}

    def add(self, pair: Pair, power: Power, cost: Cost, latents: tuple[Tensor, Tensor] | None) -> None:
        """Adds `pair`, the pictures of one prompt and seed. `power` has the sums of squares of the float denoiser's
        outputs and of the quantized denoiser's errors, in the sampled calls of this prompt. `cost` has the seconds and
        the peak memory of the pipeline's run with the quantized denoiser. `latents` are the final latents of the float
        run and of the quantized run; None if the pipeline passes no latents to a callback."""
        self.pairs.append(pair)
        self._powers.append(power)
        self._quantized_costs.append(cost)
        if latents is not None:
            self._final.add(*latents)

    def totals(self) -> dict[str, Any]:
        """Returns the measures over all pairs so far, as JSON-able values; those of the denoiser's single calls
        (`step_sqnr`) are not among them. `intervals` has the 95 % interval of each measure, as `Side.intervals`.

        A value of None under `psnr` or a key that ends in `sqnr` means that float and quantized results are equal.
        Under any other key it means that the value was not measured.
        """
        rows = [pair.row for pair in self.pairs]
        steps = list(zip(*(row["latent_error"] for row in rows), strict=True))
        outputs = total(self._powers)
        return {
            "psnr": psnr(statistics.fmean(row["mean_square"] for row in rows)),
            **{key: _mean([row[key] for row in rows]) for key in _MEANS},
            "judged": self._judged(),
            "output_sqnr": outputs.sqnr,
            "output_same": outputs.noise == 0.0,
            "latent_sqnr": self._final.sqnr,
            "latent_error": [_median_and_extremes(step) for step in steps],
            "speed": self._speed(),
            "memory": {
                side: max((cost.peak for cost in costs if cost.peak), default=None)
                for side, costs in self._costs.items()
            },
            "size": self.sizes,
            "intervals": self.intervals(),
        }

    def intervals(self) -> dict[str, list[float | None] | None]:
        """Returns the bounds [low, high] of the 95 % interval of each measure in `totals`, None for one pair. In the
        interval of a PSNR or SQNR, a bound of None means no difference."""
        rows = [pair.row for pair in self.pairs]
        errors = _interval(rows, [row["mean_square"] for row in rows])
        noises = _interval(rows, [p.noise for p in self._powers], [p.signal for p in self._powers])
        found = {
            "psnr": errors and [psnr(errors.high), psnr(errors.low)],
            "output_sqnr": noises and [_sqnr(noises.high), _sqnr(noises.low)],
        }
        for key in _MEANS:
            measured = [row for row in rows if row[key] is not None]
            found[key] = (bounds := _interval(measured, [row[key] for row in measured])) and list(bounds)
        if judged := self._judged():
            share = share_interval(judged["quantized"] / judged["of"], judged["samples"])
            found["judged"] = share and list(share)
        return found

    @property
    def samples(self) -> int:
        """The number of independent samples among the pairs so far: of prompts, or of seeds for a single prompt."""
        return _samples([pair.row for pair in self.pairs])

    def _judged(self) -> dict[str, int] | None:
        """Returns for how many pairs the picture of each side, `float` and `quantized`, shows what the prompt
        describes, by the judge of the bundled pipeline. `of` is the number of pairs that can be judged, and `samples`
        the number of independent samples among these pairs. Returns None if no pair can be judged."""
        rows = [pair.row for pair in self.pairs if "judged" in pair.row]
        counts = {side: sum(row["judged"][side] for row in rows) for side in ("float", "quantized")}
        return counts | {"of": len(rows), "samples": _samples(rows)} if rows else None

    def _speed(self) -> dict[str, Any]:
        """Returns the median seconds per picture of the float and the quantized pipeline, their ratio (float divided by
        quantized), and the smallest and the largest of the ratios of single pairs."""
        medians = {side: statistics.median(cost.seconds for cost in costs) for side, costs in self._costs.items()}
        pairs = zip(*(self._costs[side] for side in ("float", "quantized")), strict=True)
        ratios = [exact.seconds / other.seconds for exact, other in pairs]
        ratio = medians["float"] / medians["quantized"]
        return medians | {"ratio": ratio, "ratios": [min(ratios), max(ratios)], "runs": len(ratios)}


def sizes(deployed: Deployed, dtype: torch.dtype) -> dict[str, Any]:
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

    with deployed.installed() as quantized:
        other = count_bytes(quantized)
    return {"float": count_bytes(deployed.module), "quantized": other, "dtype": dtype_name(dtype)}


def _samples(rows: Sequence[Mapping[str, Any]]) -> int:
    prompts = len({row["prompt"] for row in rows})
    return prompts if prompts > 1 else len(rows)


def _interval(
    rows: Sequence[Mapping[str, Any]], values: Sequence[float], weights: Sequence[float] | None = None
) -> Interval | None:
    return ratio_interval(values, weights or [1.0] * len(values), [row["prompt"] for row in rows])


def _sqnr(ratio: float) -> float | None:
    """Returns the SQNR, in dB, for the ratio of noise to signal; None if there is no noise."""
    return -10.0 * math.log10(ratio) if ratio > 0.0 else None


def _median_and_extremes(values: tuple[float, ...]) -> dict[str, float]:
    return {"median": statistics.median(values), "smallest": min(values), "largest": max(values)}


def _mean(values: list[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return statistics.fmean(numbers) if numbers else None
