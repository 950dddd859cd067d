"""The section of the page on predictions and their errors."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from chainer_dist._files import read_regular
from chainer_dist.scaling import answers, validation
from chainer_dist.scaling.answers import ANNOUNCED, WORKERS, Prediction
from chainer_dist.scaling.cluster import NETWORKS
from chainer_dist.scaling.design import DESIGNS
from chainer_dist.scaling.page import escaped, figure, wrapped
from chainer_dist.scaling.predict import FILE
from chainer_dist.scaling.schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    Rows = Mapping[tuple[str, str, str], Sequence[Prediction]]

__all__ = ["section"]

_COLORS = dict(zip(DESIGNS, ("#8d63b8", "#c9405c", "#d9701f", "#1f83b4", "#6a9a58")))


def section(folder: Path) -> str:
    """Return what ``chainer-dist predict`` has left in a folder as HTML, or nothing if it has not. Local.

    Raises:
        ValueError: If the file is none of ours.
    """
    path = folder / FILE
    try:
        content = json.loads(read_regular(path, follow=True))
        schedules = {
            name: [Schedule(**each) for each in steps]
            for name, steps in content["schedules"].items()
        }
        predictions = [Prediction(**each) for each in content["predictions"]]
        machine, command, simulated = (content[key] for key in ("machine", "command", "simulated"))
        lines = content["answers"]
    except FileNotFoundError:
        return ""
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} has no predictions of this version: {error!r}; remove it, or predict again"
        ) from error
    rows = answers.rows(predictions)
    parts = [
        "<h2>Predicted: clusters that are not here</h2>",
        _method(machine, simulated=simulated),
    ]
    for workload in schedules:
        parts += _of_workload(workload, rows)
    parts += [
        f"<h3>{escaped(question)}</h3><ul>{_items(each)}</ul>" for question, each in lines.items()
    ]
    parts += ["<h3>The steps that were recorded</h3>", _recorded(schedules)]
    parts += [_validation(), f"<p>By <code>{escaped(command)}</code></p>"]
    return "\n".join(parts)


def _method(machine: Mapping[str, Any], *, simulated: bool) -> str:
    how = (
        "replayed by SimGrid's SMPI, in which messages share links (filled dots), and worked out from latency and "
        "bandwidth alone in closed form (lines). Hollow dots are in closed form only, as a simulation would "
        "take long"
        if simulated
        else "worked out from latency and bandwidth alone, in closed form. <b>Nothing was simulated</b>, as "
        "SimGrid's smpirun is not installed"
    )
    return (
        f"<p>A step was recorded on {escaped(machine['processor'])} ({escaped(machine['date'])}), with the moment at "
        f"which each gradient is final, and {how}. How long computation takes is that of this processor: where "
        "computation is faster, the network counts more. All ranks have the same batch (weak scaling). "
        "<b>Efficiency</b> is against plain Chainer on one rank alone; more than 100&nbsp;% is where ranks of a "
        "node share an update that costs more than the exchange. What the ranks of a node do to one another was "
        f"recorded on {escaped(machine['cores'])} cores, and is taken to be the same on more.</p>"
        "<p><b>naive</b> sums up each gradient for itself after backward, as ChainerMN's communicator; <b>flat</b> "
        "all of them packed; <b>multi-leader</b> is chainer_dist with <code>overlap=False</code>; <b>overlap</b> "
        "is chainer_dist as it comes, exchanging during backward; <b>float16</b> does that with half the "
        "bytes. What costs time: <b>latency</b> and <b>bandwidth</b> of the network, <b>waiting</b> for ranks "
        "that compute longer, and the <b>node</b>, whose ranks share its memory.</p>"
    )


def _recorded(schedules: Mapping[str, Sequence[Schedule]]) -> str:
    lines = [
        f"<tr><td>{escaped(name)}</td><td>{escaped(each.ranks)}</td><td>{escaped(each.batch)}</td>"
        f"<td>{each.alone * 1e3:.0f}</td>"
        f"<td>{each.forward * 1e3:.0f}</td><td>{each.backward * 1e3:.0f}</td>"
        f"<td>{each.update * 1e3:.0f}</td><td>{each.node_update * 1e3:.0f}</td>"
        f"<td>{each.nbytes / 1e6:.1f}</td><td>{len(each.final)}</td></tr>"
        for name, steps in schedules.items()
        for each in steps
    ]
    heads = [
        *(
            "recorded",
            "ranks",
            "batch a rank",
            "one rank alone, ms",
            "forward",
            "backward",
            "update, Chainer's",
        ),
        *("exchange on the node and update, ours", "gradients, MB", "tensors"),
    ]
    return wrapped(heads, lines)


def _of_workload(workload: str, rows: Rows) -> list[str]:
    """Return curves for each network, and tables over all kinds of clusters."""
    name = escaped(workload)
    scenarios = list(dict.fromkeys(scenario for owner, scenario, _ in rows if owner == workload))
    figures = []
    for scenario in scenarios:
        group = {key: row for key, row in rows.items() if key[:2] == (workload, scenario)}
        if scenario in NETWORKS:
            figures.append(figure(_draw, group, f"{name}, {_place(group)}"))
    parts = [f"<h3>{name}, predicted</h3>", f"<div class='figures pairs'>{''.join(figures)}</div>"]

    def limit(row: Sequence[Prediction]) -> str:
        below = answers.first_below(row)
        return "<td>not</td>" if below is None else f"<td class='low'>{below:,}</td>"

    def workers(row: Sequence[Prediction]) -> str:
        each = next((each for each in row if each.ranks == WORKERS), None)
        if each is None:
            return "<td></td>"
        mark = " class='low'" if each.efficiency < ANNOUNCED else ""
        note = "~" * (each.seconds is None)
        return f"<td{mark}>{each.efficiency * WORKERS:.0f}{note} <small>({each.efficiency:.0%})</small></td>"

    most = max(row[-1].ranks for row in rows.values())
    for title, cell in (
        (f"Below {ANNOUNCED:.1%} from so many ranks on (to {most:,})", limit),
        (f"Times as fast as one, on {WORKERS} ranks (~ in closed form only)", workers),
    ):
        lines = []
        for scenario in scenarios:
            group = {key: row for key, row in rows.items() if key[:2] == (workload, scenario)}
            lines.append(
                f"<tr><td>{_place(group)}</td>{''.join(cell(row) for row in group.values())}</tr>"
            )
        parts.append(wrapped((title, *DESIGNS), lines))
    return parts


def _place(group: Rows) -> str:
    """Return the kind of cluster in words."""
    each = next(iter(group.values()))[0]
    if each.scenario == each.network:
        return escaped(f"{each.network}, {each.ranks_per_node} ranks a node")
    return escaped(f"{each.network}, {each.scenario}")


def _draw(axes: Any, group: Rows) -> None:
    for (_, _, design), row in group.items():
        numbers = [each.ranks for each in row]
        one = row[0].efficiency * row[0].best  # seconds of one rank alone
        closed = [100 * one / each.closed_form for each in row]
        color = _COLORS[design]
        style = "--" if design == "flat" else "-"  # it often hides naive
        axes.plot(numbers, closed, color=color, linestyle=style, linewidth=1.4, label=design)
        for filled in (False, True):
            dots = [each for each in row if (each.seconds is not None) == filled]
            axes.plot(
                [each.ranks for each in dots],
                [100 * each.efficiency for each in dots],
                linestyle="",
                marker="o",
                markersize=4,
                color=color,
                markerfacecolor=color if filled else axes.get_facecolor(),
            )
    axes.axhline(100 * ANNOUNCED, color="#999999", linewidth=0.8, linestyle="--")
    axes.set_xscale("log", base=2)
    ticks = numbers[:: max(1, len(numbers) // 5)]
    axes.set_xticks(ticks, [f"{number:,}" for number in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, max(105.0, axes.get_ylim()[1]))
    axes.set_xlabel("ranks")
    axes.set_ylabel("efficiency, % of one rank alone")
    axes.grid(axis="y", alpha=0.3)


def _validation() -> str:
    machine, comparisons = validation.read()
    lines = [
        f"<tr><td>{escaped(each.workload)}</td><td>{escaped(each.contender)}</td>"
        f"<td>{escaped(each.hosts)}</td><td>{escaped(each.rate)}</td><td>{each.predicted * 1e3:.1f}</td>"
        f"<td>{each.closed_form * 1e3:.1f}</td><td>{each.measured * 1e3:.1f}</td>"
        f"<td{_mark(each)}>{each.error:+.0%}</td></tr>"
        for each in comparisons
    ]
    heads = ("", "", "hosts", "links", "predicted, ms", "closed form", "measured", "error")
    return (
        "<h3>How far predictions were off</h3>"
        f"<p>{validation.summary(comparisons)}: steps on hosts made of one machine "
        f"({escaped(machine['processor'])}, {escaped(machine['date'])}), by "
        "<code>python scripts/benchmarks/validate_prediction.py</code>. Larger clusters could not be tried.</p>"
        f"{wrapped(heads, lines)}"
    )


def _mark(comparison: validation.Comparison) -> str:
    return " class='low'" if abs(comparison.error) > validation.GOAL else ""


def _items(lines: Iterable[str]) -> str:
    return "".join(f"<li>{escaped(line)}</li>" for line in lines)
