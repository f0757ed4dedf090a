"""Opens every page of the site in Chromium: wide, on a phone and in dark colours, and tries the search.

make docs && python -m bench.site             checks all pages
python -m bench.site --png DIR how/smoothing  also saves a picture of each page; only pages whose path begins so

Prints a line for each fault of a page, and ends with exit code 1 if there is one. A page is ok if nothing sticks out at
the right of the screen, every picture loads, nothing is requested from elsewhere, the console is empty, and the page
is not white in the dark. The pages come from a server of this program.
"""

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.helpers.browser import Page, browser

SITE = Path(__file__).parents[1] / "site"
PHONE, WIDE = 390, 1280  # pixels
QUERY = "smoothing factors"
PICTURES = "[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src).join(' ')"
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
DARK = """
(async () => {
  for (let i = 0; i < 50 && document.body.dataset.mdColorScheme !== 'slate'; i++)
    await new Promise(go => setTimeout(go, 100));
  return getComputedStyle(document.body).backgroundColor !== 'rgb(255, 255, 255)';
})()
"""
SEARCH = f"""
(async () => {{
  const input = document.querySelector('.md-search__input');
  input.focus(); input.value = '{QUERY}';
  input.dispatchEvent(new KeyboardEvent('keyup'));
  for (let i = 0; i < 100; i++) {{
    const found = document.querySelectorAll('.md-search-result__link').length;
    if (found) return found;
    await new Promise(go => setTimeout(go, 100));
  }}
  return 0;
}})()
"""


class Quiet(SimpleHTTPRequestHandler):
    """Serves the files of a directory, and prints nothing."""

    def log_message(self, *_: Any) -> None:
        """Prints nothing."""


@contextmanager
def served() -> Iterator[str]:
    """Serves the site on a free port of this machine, and yields its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()


def faults(page: Page, site: str, path: Path, folder: Path | None) -> Iterator[str]:
    """Yields what is wrong with the page `path` of the site at the address `site`. Saves pictures of the page to
    `folder` if that is given."""
    address = site + str(path.relative_to(SITE))
    name = str(path.relative_to(SITE).with_suffix("")).replace("/", "_")
    for kind, width, dark in (("wide", WIDE, False), ("phone", PHONE, False), ("dark", WIDE, True)):
        page.open(address, width, dark)
        if (more := page.evaluate(OVERFLOW)) > 0:
            yield f"{kind}: {more} pixels stick out"
        if broken := page.evaluate(PICTURES):
            yield f"{kind}: pictures do not load: {broken}"
        if foreign := [url for url in page.requests() if url.startswith("http") and not url.startswith(site)]:
            yield f"{kind}: requests {foreign[0]}"
        if said := page.complaints():
            yield f"{kind}: the console says {str(said[0])[:200]}"
        if dark and not page.evaluate(DARK):
            yield "dark: the page is white"
        if folder is not None:
            page.screenshot(folder / f"{name}-{kind}.png")


def main() -> None:
    """Checks the pages and the search."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", help="beginnings of paths of pages; all if none is given")
    parser.add_argument("--png", type=Path, metavar="DIR", help="save a picture of each page to this directory")
    options = parser.parse_args()
    if options.png is not None:
        options.png.mkdir(parents=True, exist_ok=True)
    paths = [path for path in sorted(SITE.rglob("*.html")) if path.name != "404.html"]
    if options.pages:
        chosen = tuple(options.pages)
        paths = [path for path in paths if str(path.relative_to(SITE)).startswith(chosen)]
    found, began = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as profile, served() as site, browser(Path(profile)) as page:
        # the storage would keep the colours of the first visit
        page.call("Page.addScriptToEvaluateOnNewDocument", source="localStorage.clear()")
        for path in paths:
            for fault in faults(page, site, path, options.png):
                print(f"{path.relative_to(SITE)}: {fault}", flush=True)
                found += 1
        page.open(f"{site}index.html", WIDE)
        results = page.evaluate(SEARCH)
        print(f"{len(paths)} pages, {found} faults, {results} results for '{QUERY}', {time.monotonic() - began:.0f} s")
    sys.exit(1 if found or not results else 0)


if __name__ == "__main__":
    main()
