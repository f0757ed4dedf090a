"""Declares the options of `octavo compare`."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import click

from ..declarations import argument, flag, option
from ..run_options import FILES, PLACE, PROMPTS, READABLE, RunOptions


@dataclass(frozen=True, kw_only=True)
class CompareOptions(RunOptions):
    """The options of `octavo compare`: the two models, the prompts, the page, and the limits that the result has to
    meet."""

    model: str = argument()
    checkpoint: Path = argument(metavar="OUT")
    output: Path = option("Page to write.", "-o", "--output", default=Path("report.html"), metavar="FILE")
    overwrite: bool = flag("Replace FILE if it exists.")
    prompts: str = option(PROMPTS, default="", metavar="NAME|FILE")
    limit: int | None = option("Use only the first N prompts.", default=8, type=click.IntRange(1), metavar="N")
    min_psnr: float | None = option("Exit with code 1 if the PSNR of the pictures is lower.", metavar="DB")
    min_sqnr: float | None = option("Exit with code 1 if the denoiser's output SQNR is lower.", metavar="DB")
    component: str | None = option(
        "Denoiser of MODEL that OUT replaces  [default: the one that OUT was made from]", heading=PLACE, metavar="NAME"
    )
    group_readable: bool = flag(READABLE, heading=FILES)
    own_arguments: ClassVar[frozenset[str]] = RunOptions.own_arguments | {"output_type"}
