"""The page: plots and tables of a measurement in one HTML file that needs nothing else."""

from __future__ import annotations

import html
import io
import string
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chainer_dist._files import replacing
from chainer_dist.scaling import accuracy
from chainer_dist.scaling.contenders import CONTENDERS, INDEPENDENT, OURS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from chainer_dist.scaling.results import Row

__all__ = ["escaped", "figure", "wrapped", "write"]

_TEMPLATE = Path(__file__).with_name("page.html")
# Each is seen on a light page as on a dark one.
_COLORS = dict(zip(CONTENDERS, ("#1f83b4", "#d9701f", "#8d63b8", "#c9405c", "#e58a9c", "#7d8790")))
_PARTS = {
    "forward": "#9cc3d5",
    "backward": "#5b9bb8",
    "packing": "#f0c27a",
    "exchange": "#e08a3c",
    "waiting": "#cfcfcf",
    "update": "#6a9a58",
    "other": "#8c8c8c",
}
_SIZE = (4.4, 3.7)  # inches
# Matplotlib draws in these colours, which are replaced by the colours of the page's text and background.
_INK, _PAPER = "#010203", "#fdfcfb"
_STYLE: dict[Any, Any] = {
    **dict.fromkeys(
        ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), _INK
    ),
    "axes.facecolor": _PAPER,
}


def write(
    path: Path,
    *,
    rows: Sequence[Row],
    accuracies: Sequence[Mapping[str, Any]],
    parts: Mapping[tuple[str, str, int], Mapping[str, float]],
    machine: Mapping[str, Any],
    command: str,
    predicted: str = "",
) -> None:
    """Write the page, whole or not at all. Local.

    Args:
        path: Path of the file.
        rows: See :func:`chainer_dist.scaling.results.rows`.
        accuracies: See :func:`chainer_dist.scaling.results.accuracy_rows`.
        parts: See :func:`chainer_dist.scaling.results.parts`.
        machine: See :func:`chainer_dist.scaling.experiment.machine`.
        command: Command line by which all this was measured.
        predicted: See :func:`chainer_dist.scaling.predicted.section`.
    """
    sections = []
    for kind, workload in dict.fromkeys((row.kind, row.workload) for row in rows):
        group = [row for row in rows if (row.kind, row.workload) == (kind, workload)]
        shares = {key[2]: value for key, value in parts.items() if key[:2] == (kind, workload)}
        figures = [
            figure(_draw_throughput, group, "Examples a second"),
            figure(_draw_rates, group, "The same a rank: flat is perfect"),
        ]
        if shares:
            figures.append(figure(_draw_parts, shares, "Milliseconds of a step of chainer_dist"))
        sections.append(
            f"<h2>{escaped(workload)}, {escaped(kind)} scaling</h2>\n<div class='figures'>"
            f"{''.join(figures)}</div>\n{_table(group)}"
        )
    if accuracies:
        sections.append(_accuracy_section(accuracies))
    text = string.Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        headline=escaped(_headline(rows)),
        sections="\n".join(sections),
        predicted=predicted,
        contenders="".join(
            f"<dt>{escaped(name)}</dt><dd>{escaped(what)}</dd>"
            for name, what in CONTENDERS.items()
            if any(row.contender == name for row in rows)
        ),
        machine=_machine(machine),
        command=escaped(command),
    )
    with replacing(path) as file:
        file.write(text)


def _headline(rows: Iterable[Row]) -> str:
    """Return one sentence on our best-known figure: the first workload on the most ranks."""
    ours = [row for row in rows if row.contender == OURS and not row.oversubscribed]
    if not ours:
        return "Scaling efficiency"
    first = [row for row in ours if (row.kind, row.workload) == (ours[0].kind, ours[0].workload)]
    row = max(first, key=lambda row: row.ranks)
    text = (
        f"{row.workload} on {row.ranks} ranks: {row.throughput:,.0f} examples/s, "
        f"{row.efficiency:.0%} of {row.ranks} times one rank"
    )
    if row.against_copies is not None:
        text += f", {row.against_copies:.2f} times what independent copies do"
    return text


def escaped(value: object) -> str:
    """Return what stands for a value in HTML, in text as in attributes. Local.

    Names of hosts, scripts and workloads are what others have chosen, and what was measured is read from files.
    """
    return html.escape(str(value).encode("utf-8", "backslashreplace").decode())


def figure(draw: Callable[[Any, Any], str | None], content: Any, caption: str = "") -> str:
    """Return a plot as an HTML figure. Local.

    Args:
        draw: Function that gets axes of Matplotlib and ``content``, and returns the title of the legend, or None.
        content: Data that are drawn.
        caption: Caption, as HTML.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        plot = Figure(figsize=_SIZE, layout="constrained")
        FigureCanvasSVG(plot)
        axes = plot.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        title = draw(axes, content)
        plot.legend(title=title, loc="outside lower center", ncols=2, frameon=False)
        svg = io.StringIO()
        plot.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    text = svg.getvalue().replace(_INK, "currentColor").replace(_PAPER, "var(--page)")
    above = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f"<figure>{above}{text[text.index('<svg') :]}</figure>"


def _by_contender(rows: Iterable[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.ranks):
        groups.setdefault(row.contender, []).append(row)
    return {name: groups[name] for name in CONTENDERS if name in groups}


def _style(name: str) -> dict[str, Any]:
    return {
        "color": _COLORS[name],
        "label": name,
        "marker": "o",
        "linewidth": 2.2 if name == OURS else 1.4,
        "linestyle": "--" if name == INDEPENDENT else "-",
        "zorder": 3 if name == OURS else 2,
    }


def _rank_axis(axes: Any, rows: Iterable[Row]) -> None:
    numbers = sorted({row.ranks for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(numbers, [str(number) for number in numbers])
    axes.minorticks_off()
    axes.set_xlabel("ranks")
    axes.grid(axis="y", alpha=0.3)
    axes.set_ylim(bottom=0)


def _draw_throughput(axes: Any, rows: Sequence[Row]) -> None:
    for name, group in _by_contender(rows).items():
        axes.plot([row.ranks for row in group], [row.throughput for row in group], **_style(name))
    axes.set_ylabel("examples a second")
    _rank_axis(axes, rows)


def _draw_rates(axes: Any, rows: Sequence[Row]) -> str:
    """Draw throughput a rank, in which a slow contender is below a fast one however well it scales."""
    most = max((row.ranks for row in rows if not row.oversubscribed), default=1)
    for name, group in _by_contender(rows).items():
        style = _style(name)
        style["label"] += "".join(f", {row.efficiency:.0%}" for row in group if row.ranks == most)
        rates = [row.batch / row.ms * 1e3 for row in group]
        low = [rate - row.batch / row.ms_high * 1e3 for rate, row in zip(rates, group)]
        high = [row.batch / row.ms_low * 1e3 - rate for rate, row in zip(rates, group)]
        axes.errorbar([row.ranks for row in group], rates, yerr=[low, high], capsize=3, **style)
    axes.set_ylabel("examples a second and rank")
    _rank_axis(axes, rows)
    return f"efficiency on {most} rank{'s' * (most > 1)}"


def _draw_parts(axes: Any, shares: Mapping[int, Mapping[str, float]]) -> None:
    numbers = sorted(shares)
    bottom = [0.0] * len(numbers)
    for name, color in _PARTS.items():
        height = [shares[number].get(name, 0.0) * 1e3 for number in numbers]
        axes.bar(
            [str(number) for number in numbers], height, bottom=bottom, color=color, label=name
        )
        bottom = [low + more for low, more in zip(bottom, height)]
    axes.set_xlabel("ranks")
    axes.set_ylabel("milliseconds of a step")


def _table(rows: Iterable[Row]) -> str:
    lines = []
    for row in rows:
        copies = "" if row.against_copies is None else f"{row.against_copies:.2f}"
        interval = f" <small>({row.efficiency_low:.0%}&ndash;{row.efficiency_high:.0%})</small>"
        cells = [
            escaped(row.contender),
            f"{escaped(row.ranks)}{'*' * row.oversubscribed}",
            f"{row.throughput:,.0f}",
            f"{row.efficiency:.1%}{interval * (row.ranks > 1)}",
            copies,
            f"{row.ms:.1f} <small>({row.ms_low:.1f}&ndash;{row.ms_high:.1f})</small>",
            escaped(row.batch),
        ]
        mark = " class='ours'" if row.contender == OURS else ""
        lines.append(f"<tr{mark}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    heads = ("", "ranks", "examples/s", "efficiency", "of copies", "ms a step", "batch a rank")
    return wrapped(heads, lines)


def _accuracy_section(accuracies: Iterable[Mapping[str, Any]]) -> str:
    lines = [
        f"<tr><td>{escaped(each['ranks'])}</td><td>{each['seconds']:.2f}</td><td>{each['epochs']:.0f}</td>"
        f"<td>{each['updates']:.0f}</td><td>{each['accuracy']:.2%}</td>"
        f"<td>{escaped(each['reached'])} of {escaped(each['trainings'])}</td></tr>"
        for each in accuracies
    ]
    heads = ("ranks", "seconds", "epochs", "updates", "accuracy", "came to it")
    return (
        "<h2>Time to accuracy, handwritten digits</h2>\n"
        f"<p>Medians of trainings with different seeds. The rules: {escaped(accuracy.RULES)}.</p>"
        f"{wrapped(heads, lines)}"
    )


def wrapped(heads: Iterable[str], lines: Iterable[str]) -> str:
    """Return a table that can be wider than the page. Local.

    Args:
        heads: Heads of the columns, as HTML.
        lines: Rows of the table, as HTML.
    """
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f"<div class='table'><table><tr>{head}</tr>{''.join(lines)}</table></div>"


def _machine(machine: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    items = {
        "processor": f"{machine['processor']}, {machine['cores']} cores",
        "memory": f"{machine['memory_bytes'] / 2**30:.0f} GiB",
        "system": f"{machine['system']}, Python {machine['python']}",
        "versions": versions,
        "measured": f"{machine['date']}, load of the machine before: {machine['load']:.1f}",
    }
    return "".join(f"<dt>{name}</dt><dd>{escaped(text)}</dd>" for name, text in items.items())
