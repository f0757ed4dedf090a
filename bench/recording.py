"""Runs the commands of a first use, and draws what they print as a terminal that types: docs/pictures/demo.svg.

python -m bench.recording               runs the commands in a scratch directory and draws; minutes on two slow cores
python -m bench.recording --log FILE    also writes everything that the commands printed, without leaving lines out

The picture shows the commands' own output, in their own words and numbers. Long outputs are cut in the middle; a line
with dots stands for what was cut. Pauses are shortened: the picture does not show how long the commands took, but the
lines themselves say so.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from html import escape
from pathlib import Path
from typing import NamedTuple

TARGET = Path(__file__).parents[1] / "docs" / "pictures" / "demo.svg"
COLUMNS, ROWS = 84, 24  # characters in a line, lines on the screen
CHARACTER, LINE, MARGIN = 8.43, 18, 16  # pixels; 14 px monospace is 8.43 px wide
FIRST, LAST = 6, 3  # lines of a long output that stay at its beginning and its end
STEP, PAUSE, END = 0.12, 1.0, 4.0  # seconds between two lines, after a command is typed, at the end
COMMANDS = (
    "octavo capture demo captured --limit 8",
    "octavo calibrate captured w8a8",
    "octavo inspect w8a8",
    'octavo generate w8a8 "a blue ring above a yellow square on a black background" -o ring.png',
)
STYLE = """
text { font: 14px ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace; fill: #d1d7e0;
white-space: pre }
.typed { fill: #7ee787 } .cut { fill: #8b949e } .card { fill: #0d1117; stroke: #3d444d }
"""


class Line(NamedTuple):
    """A line on the screen: its `text`, and its `kind`, a class of STYLE: "", "typed" or "cut"."""

    text: str
    kind: str = ""


def output_of(command: str, folder: Path) -> list[str]:
    """Runs `command` in `folder`, and returns the lines that it printed on stdout. Ends this program if it fails."""
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"COLUMNS": str(COLUMNS), "PYTHONPATH": root}
    words = [sys.executable, "-m", *shlex.split(command)]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command}: {done.stderr}")
    return [line.rstrip() for line in done.stdout.splitlines()]


def wrapped(text: str) -> list[str]:
    """Divides `text` into lines of COLUMNS characters, as a terminal does."""
    return [text[start : start + COLUMNS] for start in range(0, max(1, len(text)), COLUMNS)]


def screen(outputs: dict[str, list[str]]) -> list[Line]:
    """Returns the lines to show for `outputs`, a dict from command to what it printed. Long outputs are cut."""
    lines: list[Line] = []
    for command, output in outputs.items():
        lines += [Line(part, "typed") for part in wrapped(f"$ {command}")]
        count = len(output) - FIRST - LAST
        first, last = (output[:FIRST], output[-LAST:]) if count > 1 else (output, [])
        lines += [Line(part) for line in first for part in wrapped(line)]
        if last:
            lines.append(Line(f"... {count} lines ...", "cut"))
        lines += [Line(part) for line in last for part in wrapped(line)]
        lines.append(Line(""))
    return lines


def drawn(lines: list[Line]) -> str:
    """Returns the SVG in which `lines` appear one after the other, and scroll up where they do not fit. Readers who
    asked their system for less motion see the last screen at once."""
    times, now = [], 0.5
    for line in lines:
        times.append(now)
        now += PAUSE if line.kind == "typed" else STEP
    total = now + END
    width, height = round(COLUMNS * CHARACTER + 2 * MARGIN), ROWS * LINE + 2 * MARGIN
    last = max(0, len(lines) - ROWS) * LINE
    frames = ["0% { transform: translateY(0) }"]
    for index in range(ROWS, len(lines)):
        share = 100 * times[index] / total
        frames += [
            f"{share - 0.01:.2f}% {{ transform: translateY({-(index - ROWS) * LINE}px) }}",
            f"{share:.2f}% {{ transform: translateY({-(index - ROWS + 1) * LINE}px) }}",
        ]
    frames.append(f"100% {{ transform: translateY({-last}px) }}")
    motion = (
        f"@keyframes scroll {{ {' '.join(frames)} }}\n@keyframes show {{ from {{ opacity: 0 }} to {{ opacity: 1 }} }}\n"
        f".screen {{ transform: translateY({-last}px) }}\n@media (prefers-reduced-motion: no-preference) {{\n"
        f".screen {{ animation: scroll {total:.1f}s linear 1 both }} text {{ animation: show 0.01s both }}\n}}"
    )
    texts = [
        f'<text x="{MARGIN}" y="{MARGIN + LINE * (number + 1) - 5}" class="{line.kind}" '
        f'style="animation-delay: {time:.2f}s">{escape(line.text)}</text>'
        for number, (line, time) in enumerate(zip(lines, times, strict=True))
        if line.text
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img" aria-labelledby="title">\n'
        '<title id="title">A terminal: octavo captures, calibrates, inspects and draws with demo</title>\n'
        f"<style>{STYLE}{motion}</style>\n"
        f'<clipPath id="view"><rect x="0" y="{MARGIN}" width="{width}" height="{ROWS * LINE}"/></clipPath>\n'
        f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8" class="card"/>\n'
        f'<g clip-path="url(#view)"><g class="screen">\n' + "\n".join(texts) + "\n</g></g>\n</svg>\n"
    )


def main() -> None:
    """Runs the commands and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", type=Path, metavar="FILE", help="write everything that was printed to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        outputs = {command: output_of(command, Path(name)) for command in COMMANDS}
    if options.log is not None:
        options.log.write_text("\n".join(f"$ {command}\n" + "\n".join(lines) for command, lines in outputs.items()))
    TARGET.write_text(drawn(screen(outputs)))
    print(TARGET.name, len(screen(outputs)), "lines")


if __name__ == "__main__":
    main()
