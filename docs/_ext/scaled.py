"""The directive ``scaled``: what ``make scaling`` has measured and predicted, from its files.

    .. scaled:: efficiency mlp

shows a chart and a table made of docs/measured/scaling.json or predictions.json, where ``make scaling`` leaves copies of what it
makes, of scaling-16.json, which is from a larger machine, or of what scripts/benchmarks/validate_prediction.py left in the
package. :data:`PARTS` lists what there is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import charts
from docutils import nodes
from docutils.parsers.rst import Directive
from front import computed
from measured import UNKNOWN, chart, listed, origin, table

from chainer_dist.scaling import answers, validation
from chainer_dist.scaling.contenders import CONTENDERS, TORCH_CHANNELS_LAST
from chainer_dist.scaling.design import DESIGNS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sphinx.application import Sphinx

RANKS = (4, 16, 64, 128, 512, 1024, 4096)
PEER = "chainermn"
# Of the designs, those that charts show of other kinds of clusters.
DRAWN = ("naive", "overlap", "float16")


def contenders(content: dict[str, Any]) -> Iterator[nodes.Node]:
    """Yield who was measured."""
    shown = {row["contender"] for row in content["rows"]}
    items = []
    for name in (name for name in CONTENDERS if name in shown):
        what = nodes.paragraph(
            "", "", nodes.literal(text=name), nodes.Text(f": {CONTENDERS[name]}")
        )
        items.append(nodes.list_item("", what))
    yield nodes.bullet_list("", *items)


def scaling(content: dict[str, Any], kind: str) -> Iterator[nodes.Node]:
    """Yield examples per second, and how many times those of one rank they are."""
    rows = [row for row in content["rows"] if row["kind"] == kind]
    workloads = [*dict.fromkeys(row["workload"] for row in rows)]
    found = {(row["contender"], row["ranks"], row["workload"]): row for row in rows}
    ranks = max(row["ranks"] for row in rows if not row["oversubscribed"])
    everyone = [*dict.fromkeys(row["contender"] for row in rows)]
    groups = {}
    for workload in workloads:
        alone = found[PEER, 1, workload]["throughput"]
        groups[workload] = []
        for who in everyone:
            row = found.get((who, ranks, workload))
            ratio = row["throughput"] / alone if row else None
            groups[workload].append(charts.Bar(ratio, f"{ratio:.1f}" if row else _missing(who)))
    caption = f"Times as many examples per second on {ranks} ranks as ChainerMN on one rank; longer is faster."
    yield from chart(*charts.bars(groups, everyone), f"{kind} scaling", caption)
    lines = []
    for who, n in dict.fromkeys((row["contender"], row["ranks"]) for row in rows):
        line = [found.get((who, n, workload)) for workload in workloads]
        mark = "*" if any(row and row["oversubscribed"] for row in line) else ""
        if n > 1:
            lines.append([f"{who}, {n} ranks{mark}", *(_throughput(row, who) for row in line)])
    yield from listed(table(["contender", *workloads], lines))
    yield computed_by(content)
    yield origin(content)


def curve(content: dict[str, Any], kind: str) -> Iterator[nodes.Node]:
    """Yield the same of one workload on many numbers of ranks."""
    rows = [row for row in content["rows"] if row["kind"] == kind]
    ranks = [*dict.fromkeys(row["ranks"] for row in rows)]
    found = {(row["contender"], row["ranks"]): row for row in rows}
    everyone = dict.fromkeys(row["contender"] for row in rows)
    curves = {
        who: {n: found[who, n]["throughput"] for n in ranks if (who, n) in found}
        for who in everyone
    }
    unit = "examples per second"
    yield from chart(*charts.lines(curves, unit=unit, height=260), f"{kind} scaling, {unit}", "")
    lines = [
        [who, *(_throughput(found.get((who, each)), who) for each in ranks)] for who in everyone
    ]
    yield from listed(table(["ranks", *map(str, ranks)], lines))
    yield computed_by(content)
    yield origin(content)


def computed_by(content: dict[str, Any]) -> nodes.Node:
    """Say what has computed forward and backward, on which every efficiency depends."""
    return nodes.paragraph(
        text=f"Steps of chainer_dist were computed by {computed(content)}. Where that is faster, the exchange "
        "counts for more, and every efficiency between machines is lower."
    )


def _throughput(row: dict[str, Any] | None, contender: str) -> str:
    return f"{row['throughput']:,.0f} ({row['efficiency']:.0%})" if row else _missing(contender)


def _missing(contender: str) -> str:
    return "takes no images" if contender == TORCH_CHANNELS_LAST else UNKNOWN


def accuracy(content: dict[str, Any]) -> Iterator[nodes.Node]:
    """Yield the seconds until an accuracy was reached."""
    found = content["accuracy"]
    groups = {
        f"{each['ranks']} rank{'s' * (each['ranks'] > 1)}": [
            charts.Bar(each["seconds"], f"{each['seconds']:.2f} s")
        ]
        for each in found
    }
    yield from chart(*charts.bars(groups, [""]), "seconds until the accuracy was reached", "")
    lines = [[str(each["ranks"]), f"{each['seconds']:.2f}"] for each in found]
    yield from listed(table(["ranks", "seconds"], lines))


def compared() -> Iterator[nodes.Node]:
    """Yield how far predictions were from measured steps."""
    machine, comparisons = validation.read()
    yield nodes.paragraph(text=f"{validation.summary(comparisons)}.")
    errors = {
        f"{each.workload}, {each.contender}, {each.hosts} hosts, {each.rate}": each.error
        for each in comparisons
    }
    worst = sorted(errors, key=lambda name: -abs(errors[name]))[:8]
    groups = {name: [charts.Bar(abs(errors[name]), f"{errors[name]:+.0%}")] for name in worst}
    caption = "The eight predictions that were furthest off, in percent of the measured step."
    yield from chart(*charts.bars(groups, ["error"]), "largest errors of predictions", caption)
    yield from listed(
        table(
            [
                "model, contender",
                "hosts",
                "links",
                "predicted, ms",
                "closed form",
                "measured",
                "error",
            ],
            [
                [
                    f"{each.workload}, {each.contender}",
                    str(each.hosts),
                    each.rate,
                    *(f"{s * 1e3:.1f}" for s in (each.predicted, each.closed_form, each.measured)),
                    f"{each.error:+.0%}",
                ]
                for each in comparisons
            ],
        )
    )
    yield origin(
        {"machine": machine, "command": "python scripts/benchmarks/validate_prediction.py"}
    )


def recorded(content: dict[str, Any]) -> Iterator[nodes.Node]:
    """Yield the steps that predictions are made of, in milliseconds."""
    times = {
        "alone": "alone",
        "forward": "forward",
        "backward": "backward",
        "update": "update, Chainer's",
        "node_update": "exchange on the node and update, ours",
    }
    lines = []
    groups = {}
    for workload, schedules in content["schedules"].items():
        for each in schedules:
            groups[f"{workload}, {each['ranks']} ranks"] = [
                charts.Bar(each[key] * 1e3, f"{each[key] * 1e3:.0f}") for key in times
            ]
            sizes = [nbytes for _, nbytes in each["final"]]
            lines.append(
                [
                    workload,
                    *(str(each[key]) for key in ("ranks", "batch")),
                    *(f"{each[key] * 1e3:.0f}" for key in times),
                    f"{sum(sizes) / 1e6:.1f}",
                    str(len(sizes)),
                ]
            )
    yield from chart(
        *charts.bars(groups, [*times.values()]),
        "recorded steps",
        "Milliseconds of a step, by what they go to.",
    )
    heads = ["model", "ranks", "batch", *times.values(), "gradients, MB", "tensors"]
    yield from listed(table(heads, lines))
    yield computed_by(content)
    yield origin(content)


def efficiency(content: dict[str, Any], workload: str) -> Iterator[nodes.Node]:
    """Yield percent of what as many ranks alone would do, on ordinary clusters."""
    networks: dict[str, dict[str, dict[int, float]]] = {}
    for (own, scenario, design), row in _rows(content).items():
        if own == workload and scenario == row[0].network:
            points = {x.ranks: x.efficiency * 100 for x in row}
            networks.setdefault(scenario, {})[design] = points
    for network, curves in networks.items():
        title = f"Efficiency in percent, {network}"
        yield from chart(*charts.lines(curves, unit=title, most=100), title, "")
    lines = [
        [
            f"{scenario}, {design}",
            *(f"{x.efficiency * 100:.0f}{_mark(x)}" for x in row if x.ranks in RANKS),
        ]
        for (own, scenario, design), row in _rows(content).items()
        if own == workload and scenario == row[0].network
    ]
    yield from listed(table(["network, design", *(f"{ranks:,} ranks" for ranks in RANKS)], lines))


def clusters(content: dict[str, Any], workload: str) -> Iterator[nodes.Node]:
    """Yield how many times as fast as one 128 ranks are, on other kinds of clusters."""
    found = {
        (scenario, design): next(each for each in row if each.ranks == answers.WORKERS)
        for (own, scenario, design), row in _rows(content).items()
        if own == workload and scenario != row[0].network
    }
    lines = []
    groups = {}
    for scenario in dict.fromkeys(scenario for scenario, _ in found):
        drawn = [found[scenario, design].efficiency * answers.WORKERS for design in DRAWN]
        groups[scenario] = [charts.Bar(times, f"{times:.0f}") for times in drawn]
        those = [found[scenario, design] for design in DESIGNS]
        cells = [f"{each.efficiency * answers.WORKERS:.0f}{_mark(each)}" for each in those]
        lines.append([scenario, *cells])
    yield from chart(*charts.bars(groups, DRAWN), f"times as fast as one rank, {workload}", "")
    yield from listed(table(["cluster", *DESIGNS], lines))


def faster(content: dict[str, Any], by_chainer: dict[str, Any]) -> Iterator[nodes.Node]:
    """Yield percent of what 128 ranks alone would do, by the code of forward and backward, on ordinary clusters."""
    kernels, own = (
        {
            key: next(each for each in row if each.ranks == answers.WORKERS)
            for key, row in _rows(each).items()
            if key[1] == row[0].network
        }
        for each in (content, by_chainer)
    )
    lines = [
        [
            f"{workload}, {network}, {design}",
            *(f"{each[workload, network, design].efficiency * 100:.0f}" for each in (own, kernels)),
        ]
        for workload, network, design in kernels
    ]
    heads = ["model, network, design", "Chainer's own code", "the kernels"]
    yield from listed(table(heads, lines))
    yield origin(by_chainer)


def answered(content: dict[str, Any]) -> Iterator[nodes.Node]:
    """Yield questions and answers."""
    for question, lines in content["answers"].items():
        yield nodes.paragraph("", "", nodes.strong(text=question))
        items = [nodes.list_item("", nodes.paragraph(text=line)) for line in lines]
        yield nodes.bullet_list("", *items)


# The files that each part is from, and what makes it.
PARTS: dict[str, tuple[str, Callable[..., Iterator[nodes.Node]]]] = {
    "contenders": ("scaling", contenders),
    "measured": ("scaling", scaling),
    "cores16": ("scaling-16", curve),
    "accuracy": ("scaling", accuracy),
    "compared": ("", compared),
    "recorded": ("predictions", recorded),
    "efficiency": ("predictions", efficiency),
    "clusters": ("predictions", clusters),
    "faster": ("predictions predictions-chainer", faster),
    "answers": ("predictions", answered),
}


class Scaled(Directive):
    """See the module."""

    required_arguments = 1
    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return a part."""
        part, *more = self.arguments
        names, make = PARTS[part]
        env = self.state.document.settings.env
        contents = []
        for file in (__file__, charts.__file__, Path(validation.__file__).with_suffix(".json")):
            env.note_dependency(str(file))
        for name in names.split():
            source = Path(env.srcdir, "measured", f"{name}.json")
            env.note_dependency(str(source))
            contents.append(json.loads(source.read_text(encoding="utf-8")))
        return list(make(*contents, *more))


def _rows(content: dict[str, Any]) -> dict[Any, list[answers.Prediction]]:
    predictions = [answers.Prediction(**each) for each in content["predictions"]]
    return {key: [*row] for key, row in answers.rows(predictions).items()}


def _mark(each: answers.Prediction) -> str:
    return "~" if each.seconds is None else ""


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("scaled", Scaled)
    return {"parallel_read_safe": True}
