"""The directive ``picture``: drawings of the concepts, as SVG within the page.

Lines and text have the colour of the page's text, and boxes are translucent, so that a picture is as
legible on a dark page as on a light one. Its width is that of a phone, on which it fills the page.
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from docutils import nodes
from docutils.parsers.rst import Directive

if TYPE_CHECKING:
    from collections.abc import Callable

    from sphinx.application import Sphinx

WIDTH = 440
BLUE, ORANGE, GREEN, GREY = "#3884ff", "#ff8c1a", "#22a565", "#888888"


class Drawing:
    """Boxes, texts and arrows, from top to bottom."""

    def __init__(self, height: int, title: str) -> None:
        self._parts: list[str] = []
        self._height, self._title = height, title

    def box(self, x: float, y: float, w: float, text: str, color: str) -> None:
        """Draw a box with a text in its middle."""
        self._parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="26" rx="3" fill="{color}" fill-opacity="0.3" '
            f'stroke="{color}"/>'
        )
        self.text(x + w / 2, y + 17.5, text, "middle")

    def text(self, x: float, y: float, text: str, anchor: str = "start") -> None:
        """Write a line."""
        self._parts.append(f'<text x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>')

    def frame(self, x: float, y: float, w: float, h: float) -> None:
        """Draw a dashed frame around what belongs together."""
        self._parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="6" fill="none" stroke="currentColor" '
            'stroke-dasharray="4 4" stroke-opacity="0.6"/>'
        )

    def arrow(self, x1: float, y1: float, x2: float, y2: float, *, both: bool = False) -> None:
        """Draw an arrow, or one with two heads."""
        start = ' marker-start="url(#head)"' if both else ""
        self._parts.append(
            f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="currentColor" stroke-width="1.3" '
            f'marker-end="url(#head)"{start}/>'
        )

    def band(self, x: float, y: float, w: float, h: float, color: str) -> None:
        """Colour an area on which the rest is drawn."""
        self._parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" fill="{color}" fill-opacity="0.12"/>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float) -> None:
        """Draw a thin line."""
        self._parts.append(
            f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="currentColor" stroke-opacity="0.35"/>'
        )

    def dot(self, x: float, y: float) -> None:
        """Draw a dot."""
        self._parts.append(f'<circle cx="{x}" cy="{y}" r="4" fill="currentColor"/>')

    def __str__(self) -> str:
        head = (
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            'markerHeight="7" orient="auto-start-reverse"><path d="M0 0 8 4 0 8z" fill="currentColor"/>'
            "</marker></defs>"
        )
        return (
            f'<figure class="picture"><svg viewBox="0 0 {WIDTH} {self._height}" role="img" '
            f'aria-label="{escape(self._title)}">{head}{"".join(self._parts)}</svg></figure>'
        )


def shared_memory() -> Drawing:
    """Two ranks of a node average and update slices through memory that both see."""
    d = Drawing(418, "Two ranks exchange gradients and share the update through shared memory")
    left, middle, right, w = 8, 158, 308, 62
    for x, text in ((left, "rank 0"), (middle, "shared memory"), (right, "rank 1")):
        d.text(x + w, 18, text, "middle")
    d.frame(middle - 10, 28, 2 * w + 20, 384)

    def pair(x: float, y: float, a: str, b: str) -> None:
        d.box(x, y, w, a, BLUE)
        d.box(x + w, y, w, b, ORANGE)

    pair(left, 40, "a0", "b0")
    pair(right, 40, "a1", "b1")
    d.text(left, 84, "gradients of")
    d.text(left, 100, "its own batch")
    pair(middle, 108, "a1", "b0")
    d.arrow(left + 1.5 * w, 68, middle + 1.4 * w, 106)
    d.arrow(right + w / 2, 68, middle + w / 2, 106)
    d.text(middle + w, 156, "what the other", "middle")
    d.text(middle + w, 172, "one will sum", "middle")
    d.box(left, 192, 2 * w, "a = (a0 + a1) / 2", BLUE)
    d.box(right, 192, 2 * w, "b = (b0 + b1) / 2", ORANGE)
    d.arrow(middle + w / 3, 136, left + w, 190)
    d.arrow(middle + 5 * w / 3, 136, right + w, 190)
    d.box(left, 250, 2 * w, "update part a", BLUE)
    d.box(right, 250, 2 * w, "update part b", ORANGE)
    d.arrow(left + w, 220, left + w, 248)
    d.arrow(right + w, 220, right + w, 248)
    pair(middle, 308, "new a", "new b")
    d.arrow(left + w, 278, middle + w / 2, 306)
    d.arrow(right + w, 278, middle + 1.5 * w, 306)
    pair(left, 370, "new a", "new b")
    pair(right, 370, "new a", "new b")
    d.arrow(middle + 1.5 * w, 336, left + 1.6 * w, 368)
    d.arrow(middle + w / 2, 336, right + w / 3, 368)
    return d


def nodes_and_slices() -> Drawing:
    """Ranks of the same number on two nodes exchange their slices."""
    d = Drawing(
        214, "Each rank exchanges its slice with the rank of the same number on other nodes"
    )
    for x, name, first in ((10, "node 0", 0), (260, "node 1", 2)):
        d.frame(x, 26, 170, 178)
        d.text(x + 85, 18, name, "middle")
        d.box(x + 20, 44, 130, f"rank {first}: slice a", BLUE)
        d.box(x + 20, 160, 130, f"rank {first + 1}: slice b", ORANGE)
        d.text(x + 85, 112, "shared", "middle")
        d.text(x + 85, 128, "memory", "middle")
        d.arrow(x + 85, 72, x + 85, 96, both=True)
        d.arrow(x + 85, 134, x + 85, 158, both=True)
    d.arrow(162, 57, 278, 57, both=True)
    d.arrow(162, 173, 278, 173, both=True)
    d.text(220, 108, "network", "middle")
    return d


def overlap() -> Drawing:
    """A step with the exchange after backward, and one with it during backward."""
    d = Drawing(262, "Exchange after backward, and during backward")
    layers = (("3", BLUE), ("2", ORANGE), ("1", GREEN))

    def lanes(y: float, title: str, starts: tuple[int, int, int], update: int) -> None:
        d.text(8, y, title)
        d.text(8, y + 30, "cores")
        d.text(8, y + 68, "network")
        d.box(72, y + 12, 70, "forward", GREY)
        for number, ((layer, color), start) in enumerate(zip(layers, starts)):
            d.box(144 + 42 * number, y + 12, 40, f"b {layer}", color)
            d.box(start, y + 50, 40, f"x {layer}", color)
        d.box(update, y + 12, 30, "u", GREY)

    lanes(18, "after backward", (272, 314, 356), 400)
    lanes(124, "during backward", (188, 230, 272), 316)
    d.text(8, 230, "b 3: backward of layer 3;  x 3: exchange of its")
    d.text(8, 248, "gradients;  u: update")
    return d


PICTURES: dict[str, Callable[[], Drawing]] = {
    each.__name__: each for each in (shared_memory, nodes_and_slices, overlap)
}


class Picture(Directive):
    """See the module."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the drawing."""
        if self.arguments[0] not in PICTURES:
            raise self.error(f"no picture {self.arguments[0]}; known: {', '.join(PICTURES)}")
        return [nodes.raw(text=str(PICTURES[self.arguments[0]]()), format="html")]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("picture", Picture)
    return {"parallel_read_safe": True}
