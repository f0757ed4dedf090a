"""Draws the pictures of docs/pictures/ as SVG: how Octavo records, stores, observes, smooths, rounds and writes.

python -m bench.pictures            draws all pictures
python -m bench.pictures --png DIR  also renders each in light and in dark with Chromium, to look at

A picture has a background of its own and follows the colours of the reader's system, so it is legible on light and on
dark pages. It loads nothing, and has a title and a description for readers who do not see it.
"""

import argparse
import shutil
import subprocess
from pathlib import Path

from bench.pictures_how import DRAWINGS

FOLDER = Path(__file__).parents[1] / "docs" / "pictures"
SCHEMES = ("light", "dark")


def write(folder: Path) -> list[Path]:
    """Writes every drawing to `folder`; returns the paths."""
    paths = []
    for name, draw in DRAWINGS.items():
        path = folder / f"{name}.svg"
        path.write_text(draw().svg())
        paths.append(path)
    return paths


def render(svg: Path, folder: Path) -> None:
    """Renders `svg` in both colour schemes to PNG files in `folder`."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("--png needs Chromium. Install it.")
    for scheme in SCHEMES:
        dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
        target = folder / f"{svg.stem}-{scheme}.png"
        page = folder / "page.html"
        colour = "#0d1117" if scheme == "dark" else "#ffffff"
        page.write_text(f"<body style='margin:8px;background:{colour}'><img src='{svg.resolve()}'>")
        subprocess.run(
            [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=760,620", *dark,
             "--allow-file-access-from-files", f"--screenshot={target}", page.as_uri()],
            check=True, capture_output=True,
        )  # fmt: skip


def main() -> None:
    """Draws the pictures, and renders them if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--png", type=Path, metavar="DIR", help="also render to PNG files in this directory")
    options = parser.parse_args()
    for path in write(FOLDER):
        print(path.relative_to(FOLDER.parents[1]))
        if options.png is not None:
            options.png.mkdir(parents=True, exist_ok=True)
            render(path, options.png)


if __name__ == "__main__":
    main()
