"""Captures, calibrates, exports and runs every tiny pipeline of tests/zoo, and prints a table of the results.

    python -m bench.models [NAME ...] [--write docs/models.md]

Each pipeline has random weights and runs two or three denoising steps. The table shows whether everything works. Its
SQNR says nothing about the accuracy of trained models.
"""

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from octavo.pipelines.load import quiet
from tests.zoo.pipelines import ZOO, make, run
from tests.zoo.walk import WalkResult, walk

HEAD = (
    "| pipeline | denoiser | calls | replay exact | layers in integers / float | SQNR of the denoiser | "
    "of the pipeline | remarks |\n|---|---|---|---|---|---|---|---|"
)


def rows(names: list[str]) -> Iterator[str]:
    """Yields the lines of the table: one for each denoiser of the named pipelines."""
    for name in names:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as directory, quiet():
            walked = walk(*make(name), run, Path(directory))
        logging.info("%s: %.1f s", name, time.perf_counter() - began)
        yield from map(line, walked)


def line(row: WalkResult) -> str:
    """Formats the line of one denoiser."""
    kind = row.kind if row.component in ("transformer", "unet") else f"{row.kind} ({row.component})"
    cells = (
        row.pipeline, kind, row.calls, "yes" if row.exact else "no", f"{row.quantized} / {row.kept_float}",
        decibels(row.sqnr), decibels(row.final), "; ".join(row.remarks),
    )  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def decibels(value: float | None) -> str:
    """Formats a number of dB; None becomes a dash."""
    return "-" if value is None else f"{value:.1f} dB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--write", type=Path, help="replace the table in this file")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("octavo.calibrate").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    table = "\n".join((HEAD, *sorted(rows(options.names or list(ZOO)))))
    if options.write is None:
        print(table)
        return
    before = options.write.read_text().partition("\n| pipeline |")[0]
    options.write.write_text(f"{before}\n{table}\n")


if __name__ == "__main__":
    main()
