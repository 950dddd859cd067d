"""Charts of measured numbers, as SVG: bars, and lines over numbers of ranks.

Text and axes have the colour of the page's text, and the other colours can be seen on dark and on light pages. A chart is as wide
as a phone; on a desk it does not fill the page.
"""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

WIDTH = 440
BLUE, ORANGE, PURPLE, GREEN, RED, GREY = (
    "#3884ff",
    "#f08010",
    "#b160d0",
    "#22a565",
    "#e0526c",
    "#888888",
)
# A contender has the same colour in every chart.
_COLORS = {
    "chainer_dist": BLUE,
    "chainermn": ORANGE,
    "naive": ORANGE,
    "torch": PURPLE,
    "allreduce": GREEN,
    "flat": GREEN,
    "torch-channels-last": RED,
    "independent": GREY,
    "overlap": BLUE,
    "multi-leader": PURPLE,
    "float16": RED,
    "fair": BLUE,
    "threads": GREY,
}
_OTHERS = (BLUE, ORANGE, PURPLE, GREEN, RED, GREY)
_LETTER = 7.2  # of a line of text, on average, at 14 pixels
_WIDE = 8.0  # of one with many capitals and digits


class Bar(NamedTuple):
    """A number, and how it is written; no number where there is none, with the reason as its text."""

    value: float | None
    text: str


def color(name: str, number: int = 0) -> str:
    """Return the colour of a series, by the first word of its name, or else by its number."""
    return _COLORS.get(name.split(maxsplit=1)[0].strip(",").lower(), _OTHERS[number % len(_OTHERS)])


def figure(parts: Iterable[str], height: float, title: str) -> str:
    """Return a chart as a figure of a page, which is as wide as there is room, up to a limit."""
    return (
        f'<figure class="picture"><svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )


def text(x: float, y: float, words: str, anchor: str = "start", fill: str = "") -> str:
    """Return a line of text; without a colour it has that of the page."""
    paint = f' fill="{fill}" style="fill:{fill}"' if fill else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{paint}>{escape(words)}</text>'


def bars(groups: Mapping[str, Sequence[Bar]], series: Sequence[str]) -> tuple[list[str], float]:
    """Draw horizontal bars: one for each group, or several below its name.

    Returns:
        The elements, and their height.
    """
    numbers = [bar.value for each in groups.values() for bar in each if bar.value is not None]
    most = max(numbers, default=0) or 1
    parts: list[str] = []
    y = 0.0
    several = len(series) > 1
    above = several or max(map(len, groups), default=0) > 30
    if several:
        shown, y = _legend(series)
        parts += shown
    left = 0.0 if above else 8 + _WIDE * max(map(len, groups), default=0)
    ends = max((len(bar.text) for each in groups.values() for bar in each), default=0)
    room = WIDTH - left - 10 - _LETTER * ends
    for name, group in groups.items():
        if above:
            y += 20
            parts.append(text(0, y - 4, name))
        for number, bar in enumerate(group):
            fill = color(series[number], number) if several else _single(name)
            length = 0 if bar.value is None else max(room * bar.value / most, 1)
            if not above:
                parts.append(text(left - 8, y + 15, name, "end"))
            if length:
                parts.append(
                    f'<rect x="{left:.1f}" y="{y + 2:.1f}" width="{length:.1f}" height="15" rx="2" fill="{fill}"/>'
                )
            parts.append(text(left + length + (5 if length else 0), y + 15, bar.text))
            y += 19 if above else 22
        y += 4 if above else 0
    return parts, y + 4


def _single(name: str) -> str:
    """Return the colour of a bar that stands for one contender: those of this package stand out."""
    words = name.replace(",", "").split()
    return BLUE if {"chainer_dist", "shared_memory"} & {*words} else GREY


def _legend(series: Sequence[str]) -> tuple[list[str], float]:
    """Return a square and a name for each series, in as many lines as it takes."""
    parts, x, y = [], 0.0, 6.0
    for number, name in enumerate(series):
        width = 24 + _LETTER * len(name) + 8
        if x and x + width > WIDTH:
            x, y = 0.0, y + 20
        parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="12" height="12" rx="2" fill="{color(name, number)}"/>'
        )
        parts.append(text(x + 18, y + 11, name))
        x += width
    return parts, y + 20


def lines(
    curves: Mapping[str, Mapping[int, float]], *, unit: str, height: float = 190, most: float = 0
) -> tuple[list[str], float]:
    """Draw a line for each contender over numbers of ranks, with its name and last number at its end.

    Returns:
        The elements, and their height.
    """
    ranks = sorted({each for curve in curves.values() for each in curve})
    top = max([most, *(y for curve in curves.values() for y in curve.values())])
    step = _round(top / 4)
    top = step * math.ceil(top / step)
    left, right, upper, lower = 8 + _LETTER * len(f"{top:,.0f}"), 296.0, 26.0, height - 40

    def at(x: int, y: float) -> tuple[float, float]:
        share = math.log(x / ranks[0]) / (math.log(ranks[-1] / ranks[0]) or 1)
        return left + 8 + (right - left - 16) * share, lower - (lower - upper) * y / top

    parts = [text(0, 14, unit)] if unit else []
    for number in range(round(top / step) + 1):
        y = at(ranks[0], number * step)[1]
        parts.append(
            f'<line x1="{left:.1f}" y1="{y:.1f}" x2="{right:.1f}" y2="{y:.1f}" stroke="currentColor" '
            'stroke-opacity="0.2"/>'
        )
        parts.append(text(left - 5, y + 5, f"{number * step:,.0f}", "end"))
    last = -100.0
    for each in ranks:
        x = at(each, 0)[0]
        if x - last > 8 + _LETTER * len(f"{each:,}"):
            parts.append(text(x, lower + 18, f"{each:,}", "middle"))
            last = x
    parts.append(text((left + right) / 2, lower + 36, "ranks", "middle"))
    ends = []
    for number, (name, curve) in enumerate(curves.items()):
        fill = color(name, number)
        points = [at(x, y) for x, y in sorted(curve.items())]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{fill}" stroke-width="2.5"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{fill}"/>' for x, y in points]
        ends.append((points[-1][1], name, curve[max(curve)], fill))
    ends.sort()
    for (_, name, value, fill), y in zip(ends, _apart([y for y, *_ in ends], lower)):
        parts.append(text(right + 4, y + 5, f"{name} {value:,.0f}", fill=fill))
    return parts, height


def _apart(places: Sequence[float], lowest: float, gap: float = 17) -> list[float]:
    """Return sorted places moved so far that no two labels overlap, around their middle, and none is too low."""
    moved: list[float] = []
    for each in places:
        moved.append(max(each, moved[-1] + gap) if moved else each)
    back = (sum(moved) - sum(places)) / len(places)
    back = max(back, moved[-1] - lowest)
    return [each - back for each in moved]


def _round(size: float) -> float:
    """Return 1, 2, 2.5 or 5 times a power of ten that is not below a size."""
    power = 10 ** math.floor(math.log10(size))
    return next(k * power for k in (1, 2, 2.5, 5, 10) if k * power >= size * 0.999)
