"""Declares the options of `octavo compare`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import click

from ..declarations import Within, argument, flag, option
from ..run_options import FILES, PLACE, PROMPTS, READABLE, RunOptions

if TYPE_CHECKING:
    from ..comparing.gates import Limit

LIMITS = "Limits (exit code 1 if one is missed)"
# preset -> highest LPIPS
PRESETS = {"pictures": 0.15, "videos": 0.20}


@dataclass(frozen=True, kw_only=True)
class CompareOptions(RunOptions):
    """The options of `octavo compare`: the two models, the prompts, the page, and the limits that the result has to
    meet."""

    model: str = argument()
    checkpoints: tuple[Path, ...] = argument(metavar="OUT...", nargs=-1, required=True)
    output: Path = option("Page to write.", "-o", "--output", default=Path("report.html"), metavar="FILE")
    overwrite: bool = flag("Replace FILE if it exists.")
    prompts: str = option(PROMPTS, default="", metavar="NAME|FILE")
    limit: int | None = option("Use only the first N prompts.", default=8, type=click.IntRange(1), metavar="N")
    seeds: int = option("Draw each prompt with N seeds.", default=1, type=click.IntRange(1), metavar="N")
    preset: str | None = option(
        "Set --max-lpips for pictures (0.15) or videos (0.20), and exit with code 1 if LPIPS is higher.",
        type=click.Choice(list(PRESETS)),
    )
    min_psnr: float | None = option("Exit with code 1 if the PSNR of the pictures is lower.", metavar="DB")
    min_sqnr: float | None = option("Lowest SQNR of the denoiser's output.", heading=LIMITS, metavar="DB")
    min_ssim: float | None = option("Lowest SSIM of the pictures.", heading=LIMITS, type=Within(-1, 1), metavar="SSIM")
    max_lpips: float | None = option(
        "Highest LPIPS of the pictures; without the weights of LPIPS, highest ST-LPIPS.",
        heading=LIMITS, type=Within(0, 10), metavar="LPIPS",
    )  # fmt: skip
    min_judged: float | None = option(
        "Lowest share of quantized pictures that show their prompt, 0 to 1; for the model demo.",
        heading=LIMITS, type=Within(0, 1), metavar="SHARE",
    )  # fmt: skip
    gate_by: str = option(
        "Compare with the limits the worst bound of the 95 % interval, the estimate, or the best bound.",
        heading=LIMITS, type=click.Choice(["worst", "estimate", "best"]), default="worst",
    )  # fmt: skip
    component: str | None = option(
        "Denoiser of MODEL that OUT replaces  [default: the one that OUT was made from]", heading=PLACE, metavar="NAME"
    )
    group_readable: bool = flag(READABLE, heading=FILES)
    own_arguments: ClassVar[frozenset[str]] = RunOptions.own_arguments | {"output_type"}

    @property
    def limits(self) -> "list[Limit]":
        """The limits that the result has to meet. An option that sets a limit wins over --preset."""
        from ..comparing.gates import Limit

        lpips = PRESETS[self.preset] if self.max_lpips is None and self.preset else self.max_lpips
        bars = {
            "--min-psnr": (self.min_psnr, ("psnr",), False),
            "--min-ssim": (self.min_ssim, ("ssim",), False),
            "--max-lpips": (lpips, ("lpips", "st_lpips"), True),
            "--min-judged": (self.min_judged, ("judged",), False),
            "--min-sqnr": (self.min_sqnr, ("output_sqnr",), False),
        }
        return [Limit(name, bar, keys, most) for name, (bar, keys, most) in bars.items() if bar is not None]
