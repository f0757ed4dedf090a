"""A small kit for drawings in SVG: boxes with text, arrows, lines, in colours for light and dark pages."""

from collections.abc import Sequence
from html import escape

WIDTH = 680  # pixels; the pages show a drawing at most this wide
STYLE = """
text { font: 15px system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif; fill: #1f2328 }
.small { font-size: 13px } .muted { fill: #59636e } .head { font-size: 16px; font-weight: 600 }
.mono { font-family: ui-monospace, SFMono-Regular, Menlo, 'DejaVu Sans Mono', monospace; font-size: 13px }
.page { fill: #ffffff; stroke: #d0d7de } .box { fill: #f3f5f8; stroke: #8b949e } .none { fill: none; stroke: #8b949e }
.int { fill: #ddf4ff; stroke: #0969da } .float { fill: #fff4c2; stroke: #9a6700 }
.good { fill: #dafbe1; stroke: #1a7f37 } .bad { fill: #ffe3e0; stroke: #cf222e }
.line { stroke: #59636e; fill: none; stroke-width: 1.5 } .head-of-arrow { fill: #59636e }
.dash { stroke-dasharray: 5 4 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .muted { fill: #a0a8b2 }
.page { fill: #161b22; stroke: #3d444d } .box { fill: #22272e; stroke: #6e7681 } .none { stroke: #6e7681 }
.int { fill: #10294a; stroke: #58a6ff } .float { fill: #3a2d08; stroke: #d29922 }
.good { fill: #12351d; stroke: #3fb950 } .bad { fill: #451a1d; stroke: #f85149 }
.line { stroke: #a0a8b2 } .head-of-arrow { fill: #a0a8b2 }
}
"""


class Drawing:
    """A drawing of WIDTH by `height` pixels, with a `title` and a `description` for readers who do not see it. Its
    methods add shapes, from back to front; x and y are pixels from the top left corner."""

    def __init__(self, height: int, title: str, description: str) -> None:
        self.height, self.title, self.description = height, title, description
        self._shapes: list[str] = []

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> None:
        """Adds a line of text with its base line at `y`. `kind` names classes of STYLE, such as "small muted"."""
        self._shapes.append(f'<text x="{x}" y="{y}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>')

    def box(
        self, x: float, y: float, width: float, height: float, lines: Sequence[str] = (), kind: str = "box",
        first: str = "", rest: str = "small muted",
    ) -> None:  # fmt: skip
        """Adds a box with centred lines of text. `first` and `rest` are the classes of the first and the further
        lines."""
        self._shapes.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" class="{kind}" stroke-width="1.3"/>'
        )
        step = 18
        top = y + height / 2 - step * (len(lines) - 1) / 2 + 5
        for number, words in enumerate(lines):
            self.text(x + width / 2, top + step * number, words, rest if number else first, "middle")

    def rect(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        """Adds a rectangle without rounded corners, as for a bar."""
        self._shapes.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" class="{kind}"/>')

    def line(self, points: Sequence[tuple[float, float]], kind: str = "line") -> None:
        """Adds a line through `points`."""
        path = " ".join(f"{x},{y}" for x, y in points)
        self._shapes.append(f'<polyline points="{path}" class="{kind}"/>')

    def arrow(self, points: Sequence[tuple[float, float]], words: str = "", dash: bool = False) -> None:
        """Adds an arrow through `points`, with `words` above the middle of its first part."""
        path = " ".join(f"{x},{y}" for x, y in points)
        kind = "line dash" if dash else "line"
        self._shapes.append(f'<polyline points="{path}" class="{kind}" marker-end="url(#arrow)"/>')
        if words:
            (x, y), (end, _) = points[0], points[1]
            self.text((x + end) / 2, y - 6, words, "small muted", "middle")

    def svg(self) -> str:
        """Returns the drawing as the text of an SVG file."""
        marker = (
            '<marker id="arrow" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
            'orient="auto-start-reverse"><path d="M0,0 L10,5 L0,10 z" class="head-of-arrow"/></marker>'
        )
        page = f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{self.height - 1}" rx="8" class="page"/>'
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" width="{WIDTH}" '
            f'height="{self.height}" role="img" aria-labelledby="title description">\n'
            f'<title id="title">{escape(self.title)}</title>\n'
            f'<desc id="description">{escape(self.description)}</desc>\n'
            f"<style>{STYLE}</style>\n<defs>{marker}</defs>\n{page}\n" + "\n".join(self._shapes) + "\n</svg>\n"
        )
