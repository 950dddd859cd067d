"""What measurements come to: medians, intervals of confidence, efficiencies, and tables of them."""

from __future__ import annotations

import csv
import json
import statistics
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from chainer_dist._files import replacing
from chainer_dist.scaling.contenders import INDEPENDENT, OURS, WITHOUT_KERNELS
from chainer_dist.scaling.experiment import ACCURACY, Job

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

__all__ = ["Row", "rows", "table", "write_csv", "write_json"]

CONFIDENCE = 0.95
_RESAMPLES = 2000


class Row(NamedTuple):
    """What a contender does with a number of ranks.

    Attributes:
        kind: ``weak`` or ``strong``.
        workload: Name of the workload.
        contender: Name of the contender.
        ranks: Number of ranks.
        batch: Number of examples in a batch of one rank.
        steps: How many steps were timed.
        ms: Milliseconds of a step, the slowest rank's; the median.
        ms_low: The interval of confidence of that,
        ms_high: at 95 %, from a bootstrap of the steps.
        throughput: Examples a second, of all ranks.
        efficiency: Throughput, divided by that of as many ranks as it would be from its own one rank.
        efficiency_low: Lower end of the confidence interval of the efficiency.
        efficiency_high: Upper end of that interval.
        against_copies: Throughput, divided by that of independent copies at the same time; None where
            these were not measured, or compute by other kernels.
        oversubscribed: Whether there were more ranks than cores.
    """

    kind: str
    workload: str
    contender: str
    ranks: int
    batch: int
    steps: int
    ms: float
    ms_low: float
    ms_high: float
    throughput: float
    efficiency: float
    efficiency_low: float
    efficiency_high: float
    against_copies: float | None
    oversubscribed: bool


def rows(results: Mapping[Job, dict[str, Any]], cores: int | None) -> list[Row]:
    """Return what results come to, by kind and workload. Local.

    Args:
        results: The seconds of steps of each job.
        cores: How many there are; None where ranks are on several hosts.
    """
    timed: dict[Job, list[float]] = {}
    for job, result in results.items():
        if job.kind != ACCURACY:
            timed.setdefault(job._replace(round=0), []).extend(result["seconds"])
    kinds = dict.fromkeys(job.kind for job in timed)
    for job, seconds in list(timed.items()):
        if job.ranks == 1:  # is the same in all kinds, and measured once
            timed.update({job._replace(kind=kind): seconds for kind in kinds})
    order = {name: number for number, name in enumerate(dict.fromkeys(j.workload for j in timed))}
    found = []
    for job in sorted(
        timed, key=lambda job: ([*kinds].index(job.kind), order[job.workload], job.ranks)
    ):
        one = next((each for each in timed if each[:3] == job[:3] and each.ranks == 1), None)
        copies = timed.get(job._replace(contender=INDEPENDENT))
        if job.contender in WITHOUT_KERNELS:
            copies = None
        median = statistics.median(timed[job])
        low, high = _interval(timed[job])
        efficiency = (float("nan"),) * 3
        if one is not None:
            # Examples a second and rank, here and on one rank.
            share = job.batch / one.batch
            interval = (1.0, 1.0) if one == job else _interval(timed[one], timed[job])
            efficiency = (
                share * statistics.median(timed[one]) / median,
                share * interval[0],
                share * interval[1],
            )
        found.append(
            Row(
                job.kind,
                job.workload,
                job.contender,
                job.ranks,
                job.batch,
                len(timed[job]),
                median * 1e3,
                low * 1e3,
                high * 1e3,
                job.ranks * job.batch / median,
                *efficiency,
                statistics.median(copies) / median if copies else None,
                cores is not None and job.ranks > cores,
            )
        )
    return found


def _interval(*samples: Sequence[float]) -> tuple[float, float]:
    """Return the interval of confidence of a median, or of the ratio of two."""
    from scipy.stats import bootstrap

    def ratio(*arrays: Any, axis: int = -1) -> Any:
        first, *rest = (np.median(each, axis=axis) for each in arrays)
        return first / rest[0] if rest else first

    interval = bootstrap(
        samples,
        ratio,
        n_resamples=_RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        vectorized=True,
        random_state=0,
    ).confidence_interval
    return float(interval.low), float(interval.high)


def accuracy_rows(results: Mapping[Job, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the medians of the trainings to an accuracy, a row for each number of ranks. Local."""
    found: dict[int, list[dict[str, Any]]] = {}
    for job, result in results.items():
        if job.kind == ACCURACY:
            found.setdefault(job.ranks, []).append(result)
    return [
        {
            "ranks": ranks,
            **{
                name: statistics.median(each[name] for each in group)
                for name in ("seconds", "epochs", "updates", "accuracy")
            },
            "reached": sum(each["reached"] for each in group),
            "trainings": len(group),
        }
        for ranks, group in found.items()
    ]


def parts(results: Mapping[Job, dict[str, Any]]) -> dict[tuple[str, str, int], dict[str, float]]:
    """Return seconds of each part of our steps, by kind, workload and ranks; medians. Local."""
    groups: dict[tuple[str, str, int], list[dict[str, float]]] = {}
    kinds = dict.fromkeys(job.kind for job in results if job.kind != ACCURACY)
    for job, result in results.items():
        if job.contender == OURS and result.get("parts"):
            for kind in kinds if job.ranks == 1 else [job.kind]:  # one rank is the same in all
                groups.setdefault((kind, job.workload, job.ranks), []).append(result["parts"])
    return {
        key: {name: statistics.median(each[name] for each in group) for name in group[0]}
        for key, group in groups.items()
    }


def table(found: Iterable[Row], accuracies: Sequence[Mapping[str, Any]]) -> str:
    """Return the results as text to read. Local."""
    lines: list[str] = []
    heading = None
    for row in found:
        if heading != (row.kind, row.workload):
            heading = row.kind, row.workload
            columns = [("ranks", 6), ("batch", 6), ("step, ms", 10), ("examples/s", 12)]
            columns += [("efficiency", 11), ("95 %", 12), ("of copies", 10)]
            lines += ["", f"{row.workload}, {row.kind} scaling"]
            lines.append(" " * 20 + "".join(f"{text:>{width}}" for text, width in columns))
        copies = "" if row.against_copies is None else f"{row.against_copies:.2f}"
        lines.append(
            f"{row.contender:20}{row.ranks:>6}{row.batch:>6}{row.ms:>10.1f}"
            f"{row.throughput:>12,.0f}"
            f"{row.efficiency:>11.1%}{f'{row.efficiency_low:.0%}-{row.efficiency_high:.0%}':>12}"
            f"{copies:>10}{'  more ranks than cores' * row.oversubscribed}"
        )
    if accuracies:
        lines += ["", f"{'digits':20}{'ranks':>6}{'seconds':>9}{'epochs':>8}{'updates':>9}"]
    for each in accuracies:
        missed = each["trainings"] - each["reached"]
        lines.append(
            f"{'':20}{each['ranks']:>6}{each['seconds']:>9.2f}{each['epochs']:>8.0f}"
            f"{each['updates']:>9.0f}{f'  {missed} did not come to it' * bool(missed)}"
        )
    return "\n".join(lines).lstrip("\n") + "\n"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file whole or not at all. Local."""
    with replacing(path) as file:
        file.write(json.dumps(content, indent=1) + "\n")


def write_csv(path: Path, found: Sequence[Any]) -> None:
    """Write rows, named tuples of one kind, with a heading, whole or not at all. Local."""
    with replacing(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(found[0]._fields)
        writer.writerows(found)
