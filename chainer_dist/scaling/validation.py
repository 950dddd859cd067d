"""How far predicted steps were from measured ones, when that was last tried.

``scripts/benchmarks/validate_prediction.py --out chainer_dist/scaling/validation.json`` tries it, as root, on hosts
made of one machine. What came of it travels with the package, so that no prediction is shown without its
errors.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["GOAL", "Comparison", "read", "summary"]

GOAL = 0.15  # of an error

_FILE = Path(__file__).with_name("validation.json")


class Comparison(NamedTuple):
    """A step, predicted and measured; all times in seconds.

    Attributes:
        hosts: Number of hosts, of one rank each.
        rate: Rate of their links, as ``tc`` writes it.
        workload: Name of the workload.
        contender: Name of the contender, see :data:`chainer_dist.scaling.contenders.CONTENDERS`.
        predicted: Seconds of a step, simulated by SMPI.
        closed_form: Seconds of a step, in closed form.
        measured: Median of the measured seconds of a step.
    """

    hosts: int
    rate: str
    workload: str
    contender: str
    predicted: float
    closed_form: float
    measured: float

    @property
    def error(self) -> float:
        """Of the prediction, as a part of what was measured; below 0 if it took longer than predicted."""
        return self.predicted / self.measured - 1


def summary(comparisons: Iterable[Comparison]) -> str:
    """Return the errors in words. Local."""
    sizes = [abs(each.error) for each in comparisons]
    return (
        f"{sum(each <= GOAL for each in sizes)} of {len(sizes)} predictions within {GOAL:.0%}, the median "
        f"error {statistics.median(sizes):.0%}, the largest {max(sizes):.0%}"
    )


def read() -> tuple[dict[str, Any], list[Comparison]]:
    """Return the machine and the comparisons of the last time. Local."""
    content = json.loads(_FILE.read_text(encoding="utf-8"))
    return content["machine"], [Comparison(**each) for each in content["comparisons"]]
