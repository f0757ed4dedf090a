"""Measures on the bundled pipeline whether the advice of a calibration holds: calibrates, leaves the advised layers
float, and calibrates again.

    python -m bench.bench_advice [--rows "fp8 by row" mxfp8] [--outliers] [--prompts 8] [--samples 56]

The rows are those of `bench.accuracy`. Each row has the SQNR of the transformer's output before and after, the gain
that the advice promised, and the bytes of all linear layers before and after.
"""

import argparse
from typing import Any

from octavo.calibrate.advice import advice_line
from octavo.calibrate.byte_sizes import size
from octavo.calibrate.calibration import calibrate
from octavo.calibrate.settings import Settings
from octavo.pipelines.sd3 import SD3
from octavo.prompts import read_prompts

from .accuracy import ROWS, demo_pipeline, recorded

HEAD = "| method | SQNR | advised gain | SQNR with it | layers | layers with it |\n|---|---|---|---|---|---|"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", nargs="*", default=["--accuracy balanced", "fp8 by row", "mxfp8"])
    parser.add_argument("--outliers", action="store_true")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=56)
    options = parser.parse_args()
    pipe = demo_pipeline(outliers=options.outliers)
    model = pipe.transformer
    calls = recorded(pipe, list(read_prompts("demo").texts[: options.prompts]))
    print(HEAD)
    for name in options.rows:
        settings = Settings(defaults=SD3.keep_float, groups=SD3.groups, samples=options.samples, **ROWS[name])
        before = calibrate(model, lambda: calls, settings).report
        advice: dict[str, Any] | None = before["advice"]
        if advice is None:
            print(f"| {name} | {before['totals']['output_sqnr']:.1f} dB | no advice | | | |", flush=True)
            continue
        after = calibrate(model, lambda: calls, settings.keeping(dict.fromkeys(advice["keep_float"], "advised"))).report
        sqnrs = [f"{report['totals']['output_sqnr']:.1f} dB" for report in (before, after)]
        sizes = [size(report["totals"]["bytes_after"]) for report in (before, after)]
        print(f"| {name} | {sqnrs[0]} | {advice['gain']:.1f} dB | {sqnrs[1]} | {' | '.join(sizes)} |", flush=True)
        print(advice_line(advice), flush=True)


if __name__ == "__main__":
    main()
