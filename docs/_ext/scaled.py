"""The directive ``scaled``: what ``make scaling`` has measured and predicted, from its files.

    .. scaled:: efficiency mlp

shows a table made of docs/measured/scaling.json or predictions.json, where ``make scaling`` leaves copies of what it
makes, of scaling-16.json, which is from a larger machine, or of what scripts/benchmarks/validate_prediction.py left in the
package. :data:`PARTS` lists what there is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docutils import nodes
from docutils.parsers.rst import Directive
from measured import origin, table

from chainer_dist.scaling import answers, validation
from chainer_dist.scaling.design import DESIGNS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sphinx.application import Sphinx

RANKS = (4, 16, 64, 128, 512, 1024, 4096)


def scaling(content: dict[str, Any], kind: str) -> Iterator[nodes.Node]:
    """Yield examples a second, and how many times those of one rank they are."""
    rows = [row for row in content["rows"] if row["kind"] == kind and row["ranks"] > 1]
    workloads = [*dict.fromkeys(row["workload"] for row in rows)]
    found = {(row["contender"], row["ranks"], row["workload"]): row for row in rows}
    lines = []
    for who, ranks in dict.fromkeys((row["contender"], row["ranks"]) for row in rows):
        line = [found.get((who, ranks, workload)) for workload in workloads]
        mark = "*" if any(row and row["oversubscribed"] for row in line) else ""
        lines.append([f"{who}, {ranks} ranks{mark}", *map(_throughput, line)])
    yield table(["", *workloads], lines)
    yield origin(content)


def curve(content: dict[str, Any], kind: str) -> Iterator[nodes.Node]:
    """Yield the same of one workload on many numbers of ranks."""
    rows = [row for row in content["rows"] if row["kind"] == kind]
    ranks = [*dict.fromkeys(row["ranks"] for row in rows)]
    found = {(row["contender"], row["ranks"]): row for row in rows}
    contenders = dict.fromkeys(row["contender"] for row in rows)
    lines = [[who, *(_throughput(found.get((who, each))) for each in ranks)] for who in contenders]
    yield table(["ranks", *map(str, ranks)], lines)
    yield origin(content)


def _throughput(row: dict[str, Any] | None) -> str:
    return f"{row['throughput']:,.0f} ({row['efficiency']:.0%})" if row else ""


def accuracy(content: dict[str, Any]) -> Iterator[nodes.Node]:
    """Yield the seconds until an accuracy was reached."""
    lines = [[str(each["ranks"]), f"{each['seconds']:.2f}"] for each in content["accuracy"]]
    yield table(["ranks", "seconds"], lines)


def compared(_: dict[str, Any]) -> Iterator[nodes.Node]:
    """Yield how far predictions were from measured steps."""
    machine, comparisons = validation.read()
    yield nodes.paragraph(text=f"{validation.summary(comparisons)}.")
    yield table(
        ["model, contender", "hosts", "links", "predicted, ms", "closed form", "measured", "error"],
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
    for workload, schedules in content["schedules"].items():
        for each in schedules:
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
    heads = ["model", "ranks", "batch", *times.values(), "gradients, MB", "tensors"]
    yield table(heads, lines)
    yield origin(content)


def efficiency(content: dict[str, Any], workload: str) -> Iterator[nodes.Node]:
    """Yield percent of what as many ranks alone would do, on ordinary clusters."""
    lines = [
        [
            f"{scenario}, {design}",
            *(f"{x.efficiency * 100:.0f}{_mark(x)}" for x in row if x.ranks in RANKS),
        ]
        for (own, scenario, design), row in _rows(content).items()
        if own == workload and scenario == row[0].network
    ]
    yield table(["ranks", *(f"{ranks:,}" for ranks in RANKS)], lines)


def clusters(content: dict[str, Any], workload: str) -> Iterator[nodes.Node]:
    """Yield how many times as fast as one 128 ranks are, on other kinds of clusters."""
    found = {
        (scenario, design): next(each for each in row if each.ranks == answers.WORKERS)
        for (own, scenario, design), row in _rows(content).items()
        if own == workload and scenario != row[0].network
    }
    lines = []
    for scenario in dict.fromkeys(scenario for scenario, _ in found):
        those = [found[scenario, design] for design in DESIGNS]
        cells = [f"{each.efficiency * answers.WORKERS:.0f}{_mark(each)}" for each in those]
        lines.append([scenario, *cells])
    yield table(["", *DESIGNS], lines)


def answered(content: dict[str, Any]) -> Iterator[nodes.Node]:
    """Yield questions and answers."""
    for question, lines in content["answers"].items():
        yield nodes.paragraph("", "", nodes.strong(text=question))
        items = [nodes.list_item("", nodes.paragraph(text=line)) for line in lines]
        yield nodes.bullet_list("", *items)


# Where each part is from, and what makes it.
PARTS: dict[str, tuple[str, Callable[..., Iterator[nodes.Node]]]] = {
    "measured": ("scaling", scaling),
    "cores16": ("scaling-16", curve),
    "accuracy": ("scaling", accuracy),
    "compared": ("", compared),
    "recorded": ("predictions", recorded),
    "efficiency": ("predictions", efficiency),
    "clusters": ("predictions", clusters),
    "answers": ("predictions", answered),
}


class Scaled(Directive):
    """See the module."""

    required_arguments = 1
    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return a part."""
        part, *more = self.arguments
        name, make = PARTS[part]
        content = {}
        if name:
            env = self.state.document.settings.env
            file = Path(env.srcdir, "measured", f"{name}.json")
            env.note_dependency(str(file))
            content = json.loads(file.read_text(encoding="utf-8"))
        return list(make(content, *more))


def _rows(content: dict[str, Any]) -> dict[Any, list[answers.Prediction]]:
    predictions = [answers.Prediction(**each) for each in content["predictions"]]
    return {key: [*row] for key, row in answers.rows(predictions).items()}


def _mark(each: answers.Prediction) -> str:
    return "~" if each.seconds is None else ""


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("scaled", Scaled)
    return {"parallel_read_safe": True}
