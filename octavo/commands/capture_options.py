"""The options of `octavo capture`."""

from dataclasses import dataclass
from pathlib import Path

import click

from ..declarations import argument, flag, option, several
from ..run_options import FILES, OFFLOAD, PLACE, PROMPTS, READABLE, RunOptions
from ..words import FAMILIES

STORED = "What is stored"
FAILURE = "When something fails"


@dataclass(frozen=True, kw_only=True)
class CaptureOptions(RunOptions):
    """The model, the prompts, and what is stored of the calls."""

    model: str = argument()
    capture: Path = argument()
    prompts: str = option(PROMPTS, default="", metavar="NAME|FILE")
    limit: int | None = option("Take only the first N prompts.", type=click.IntRange(1), metavar="N")
    resume: bool = flag("Go on with an interrupted capture.")
    keep: str = option(
        "Denoising steps to store: all, every:N or spread:K.", default="all", heading=STORED, metavar="RULE"
    )
    components: tuple[str, ...] = several(
        "Record only this module; may be repeated  [default: every denoiser]",
        "--component",
        heading=STORED,
        metavar="NAME",
    )
    dropped: tuple[str, ...] = several(
        "Do not store this argument of the calls; may be repeated.", "--drop-input", heading=STORED, metavar="NAME"
    )
    nonfinite: str = option(
        "Refuse or leave out a call that holds NaN or Inf.",
        default="error", heading=STORED, type=click.Choice(["error", "skip"]),
    )  # fmt: skip
    keep_going: bool = flag("Go on after a prompt that fails; exit with 1 at the end.", heading=FAILURE)
    keep_removed: bool = flag("With --resume, keep prompts that are no longer in the file.", heading=FAILURE)
    strict: bool = flag("Refuse weights that the model does not know.", heading=FAILURE)
    pipeline: str | None = option(
        f"Family of MODEL: {', '.join(FAMILIES)}  [default: what its files say]",
        heading=PLACE, type=click.Choice(FAMILIES), metavar="NAME",
    )  # fmt: skip
    offload: bool = flag(OFFLOAD, heading=PLACE)
    pth: Path | None = option(
        "Write the calls to FILE as well, as the torch.save list that msModelSlim documents.",
        heading=FILES, metavar="FILE",
    )  # fmt: skip
    group_readable: bool = flag(READABLE, heading=FILES)
