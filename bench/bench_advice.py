"""Measures on the bundled pipeline whether the advice of a calibration holds: calibrates, leaves the advised layers
float, and calibrates again.

    python -m bench.bench_advice [--rows "fp8 by row" mxfp8] [--outliers] [--prompts 8] [--samples 56] [--layers 6]

The rows are those of `bench.accuracy`. Each row has the SQNR of the transformer's output before and after, over all
calls of two held-out prompts, the gain that the advice promised, and the bytes of all linear layers before and after.
With --layers N, the N layers with the largest share in the error of the output stay float instead of the advised ones.
"""

import argparse
from typing import Any

from octavo.calibrate.advice import advice_line
from octavo.calibrate.byte_sizes import size
from octavo.calibrate.calibration import calibrate
from octavo.calibrate.settings import Settings
from octavo.pipelines.sd3 import SD3
from octavo.prompts import read_prompts

from .accuracy import ROWS, demo_pipeline, recorded, sqnr

HEAD = "| method | SQNR | advised gain | SQNR with it | layers | layers with it |\n|---|---|---|---|---|---|"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", nargs="*", default=["--accuracy balanced", "fp8 by row", "mxfp8"])
    parser.add_argument("--outliers", action="store_true")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=56)
    parser.add_argument("--layers", type=int, help="how many layers stay float (default: the advised ones)")
    options = parser.parse_args()
    pipe = demo_pipeline(outliers=options.outliers)
    model = pipe.transformer
    calls = recorded(pipe, list(read_prompts("demo").texts[: options.prompts]))
    held_out = recorded(pipe, list(read_prompts("demo-heldout").texts[-2:]))
    print(HEAD)
    for name in options.rows:
        settings = Settings(defaults=SD3.keep_float, groups=SD3.groups, samples=options.samples, **ROWS[name])
        before = calibrate(model, lambda: calls, settings)
        advice: dict[str, Any] | None = before.report["advice"]
        kept = advice["keep_float"] if advice else []
        if options.layers is not None:
            rows = sorted(before.report["layers"], key=lambda row: -row.get("output_share", -1.0))
            kept = [row["name"] for row in rows[: options.layers]]
        after = calibrate(model, lambda: calls, settings.keeping(dict.fromkeys(kept, "advised"))) if kept else before
        sqnrs = [f"{sqnr(model, result.layers, held_out):.1f} dB" for result in (before, after)]
        sizes = [size(result.report["totals"]["bytes_after"]) for result in (before, after)]
        gain = f"{advice['gain']:.1f} dB" if advice else "no advice"
        print(f"| {name} | {sqnrs[0]} | {gain} | {sqnrs[1]} | {' | '.join(sizes)} |", flush=True)
        print(", ".join(kept) if options.layers is not None else advice_line(advice) or "")


if __name__ == "__main__":
    main()
