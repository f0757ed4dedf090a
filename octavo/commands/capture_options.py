"""Declares the options of `octavo capture`."""

from dataclasses import dataclass
from pathlib import Path

import click

from ..declarations import argument, flag, option, several
from ..run_options import FILES, LORA, OFFLOAD, PLACE, PROMPTS, READABLE, RunOptions
from ..words import FAMILIES

STORED = "What is stored"
FAILURE = "When something fails"


@dataclass(frozen=True, kw_only=True)
class CaptureOptions(RunOptions):
    """The options of `octavo capture`: the model, the prompts, and the calls and arguments to store."""

    model: str = argument()
    capture: Path = argument()
    prompts: str = option(PROMPTS, default="", metavar="NAME|FILE")
    limit: int | None = option("Use only the first N prompts.", type=click.IntRange(1), metavar="N")
    resume: bool = flag("Continue an interrupted capture.")
    keep: str = option(
        "Denoising steps to store: all, every:N (every N-th) or spread:K (K, evenly spaced).",
        default="all", heading=STORED, metavar="RULE",
    )  # fmt: skip
    components: tuple[str, ...] = several(
        "Record only this denoiser; may be repeated  [default: every denoiser]",
        "--component",
        heading=STORED,
        metavar="NAME",
    )
    dropped: tuple[str, ...] = several(
        "Do not store this argument of the calls; may be repeated.", "--drop-input", heading=STORED, metavar="NAME"
    )
    nonfinite: str = option(
        "For a call with NaN or Inf: stop with an error, or do not store the call.",
        default="error", heading=STORED, type=click.Choice(["error", "skip"]),
    )  # fmt: skip
    keep_going: bool = flag("Continue after a prompt that fails; exit with code 1 at the end.", heading=FAILURE)
    keep_removed: bool = flag(
        "With --resume, keep captured prompts that are no longer in the prompts file.", heading=FAILURE
    )
    strict: bool = flag("Refuse weight files with tensors that the model does not have.", heading=FAILURE)
    pipeline: str | None = option(
        f"Family of MODEL: {', '.join(FAMILIES)}  [default: read from its files]",
        heading=PLACE, type=click.Choice(FAMILIES), metavar="NAME",
    )  # fmt: skip
    loras: tuple[str, ...] = several(LORA, "--lora", heading=PLACE, metavar="FILE[:SCALE]")
    offload: bool = flag(OFFLOAD, heading=PLACE)
    pth: Path | None = option(
        "Also write the calls to FILE, as the torch.save list that msModelSlim documents.",
        heading=FILES, metavar="FILE",
    )  # fmt: skip
    group_readable: bool = flag(READABLE, heading=FILES)
