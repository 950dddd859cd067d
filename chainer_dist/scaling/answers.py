"""What predictions come to, in words: from which size a design is no longer efficient, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from chainer_dist.communicators.shared_memory.slots import BLOCK_BYTES, n_slots, sums_in_flight
from chainer_dist.compression import TopK
from chainer_dist.scaling.closed_form import closed_form
from chainer_dist.scaling.cluster import NETWORKS, Cluster
from chainer_dist.scaling.design import DESIGNS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from chainer_dist.scaling.schedule import Schedule

__all__ = ["ANNOUNCED", "WORKERS", "Prediction", "answers", "first_below", "limit", "rows"]

WORKERS = 128
ANNOUNCED = 0.852  # ChainerMN's: 109 times as fast on 128 GPUs (Akiba et al., 2017)

_COSTS = ("latency", "bandwidth", "waiting", "node")
_LITTLE = 0.05  # of a step
_PLACE = "10 Gbit/s Ethernet"
_SPEEDS = [1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 300, 500, 1000]


class Prediction(NamedTuple):
    """A step on a cluster; all times in seconds.

    Attributes:
        workload: Name of the workload.
        scenario: The kind of cluster, by its name.
        network: The network, by its name.
        ranks_per_node: Number of ranks on each node.
        straggler: See :class:`chainer_dist.scaling.cluster.Cluster`.
        jitter: See :class:`chainer_dist.scaling.cluster.Cluster`.
        oversubscription: See :class:`chainer_dist.scaling.cluster.Cluster`.
        ranks: Number of ranks on all nodes.
        design: See :data:`chainer_dist.scaling.design.DESIGNS`.
        seconds: Seconds of a step, simulated by SMPI; None where that would have taken too long.
        closed_form: Seconds of a step, in closed form.
        efficiency: Throughput of a rank, divided by plain Chainer's on one rank alone. More than 1 where ranks of a node
            share an update that costs more than the exchange.
        latency: Seconds by which the step would be shorter without latency, in closed form.
        bandwidth: Seconds by which it would be shorter with unlimited bandwidth.
        waiting: Seconds by which it would be shorter if all ranks computed equally long.
        comparisons: Seconds by which it would be shorter if ranks did not compare.
        node: Seconds by which a step on one such node is longer than plain Chainer's on one rank alone, as
            ranks share its memory; below 0 where they share an update that costs more.
    """

    workload: str
    scenario: str
    network: str
    ranks_per_node: int
    straggler: float
    jitter: float
    oversubscription: float
    ranks: int
    design: str
    seconds: float | None
    closed_form: float
    efficiency: float
    latency: float
    bandwidth: float
    waiting: float
    comparisons: float
    node: float

    @property
    def best(self) -> float:
        """Seconds of a step: simulated if they were, else in closed form."""
        return self.closed_form if self.seconds is None else self.seconds


def first_below(row: Sequence[Prediction]) -> int | None:
    """Return from which number of ranks on a design is below :data:`ANNOUNCED`, or None. Local.

    Args:
        row: Predictions for one design, from few ranks to many.
    """
    below = None
    for each in reversed(row):
        if each.efficiency >= ANNOUNCED:
            break
        below = each.ranks
    return below


def limit(row: Sequence[Prediction]) -> str:
    """Return the result of :func:`first_below` in words. Local."""
    below = first_below(row)
    if below is None:
        return f"not below {ANNOUNCED:.1%}"
    return f"below {ANNOUNCED:.1%} from {below:,} ranks"


def rows(predictions: Iterable[Prediction]) -> dict[tuple[str, str, str], list[Prediction]]:
    """Return predictions by workload, scenario and design, from few ranks to many. Local."""
    found: dict[tuple[str, str, str], list[Prediction]] = {}
    for each in sorted(predictions, key=lambda each: each.ranks):
        found.setdefault((each.workload, each.scenario, each.design), []).append(each)
    return found


def answers(
    schedules: Mapping[str, Sequence[Schedule]], predictions: Sequence[Prediction]
) -> dict[str, list[str]]:
    """Return questions and the lines that answer them. Local.

    Args:
        schedules: Recorded schedules by workload, on few ranks first.
        predictions: For these workloads.
    """
    most = max(each.ranks for each in predictions)
    found = rows(predictions)
    at_most = [row[-1] for row in found.values() if row[-1].ranks == most]
    workers = [
        each
        for row in found.values()
        for each in row
        if each.ranks == WORKERS and each.scenario == each.network
    ]
    questions = {
        f"From which size on is each design below {ANNOUNCED:.1%}, what ChainerMN announced for "
        f"{WORKERS} GPUs?": list(_limits(found, most)),
        f"What do {WORKERS} workers give (announced: 109 times one)?": _by_network(
            workers, lambda each: f"{each.efficiency * WORKERS:.0f} ({each.efficiency:.0%})"
        ),
        f"How many times as fast as this processor may others be, until on {WORKERS} ranks a design is below "
        f"{ANNOUNCED:.1%}?": _by_network(
            workers, lambda each: _fastest(schedules[each.workload], each)
        ),
        f"What breaks first on {most:,} ranks? What costs most of a step:": list(
            _what_breaks(at_most)
        ),
        "What grows with the number of ranks?": list(_what_grows(schedules, at_most)),
    }
    return {question: lines for question, lines in questions.items() if lines}


def _limits(found: Mapping[tuple[str, str, str], Sequence[Prediction]], most: int) -> Iterator[str]:
    """Yield a line for each workload and design: where it is no longer efficient, and from when on."""
    for workload, design in dict.fromkeys((key[0], key[2]) for key in found):
        group = {
            key[1]: row for key, row in found.items() if (key[0], key[2]) == (workload, design)
        }
        places: dict[str, list[str]] = {}
        for scenario, row in group.items():
            below = first_below(row)
            if below is not None:
                size = "one node" if below == row[0].ranks else f"{below:,} ranks"
                places.setdefault(size, []).append(scenario)
        texts = [
            f"{size} ({'everywhere' if len(where) == len(group) else ', '.join(where)})"
            for size, where in places.items()
        ]
        yield f"{workload}, {design}: {'; '.join(texts) or f'nowhere up to {most:,} ranks'}"


def _by_network(predictions: Sequence[Prediction], words: Callable[[Prediction], str]) -> list[str]:
    """Return a line for each workload and network, with words for each design."""
    lines: dict[str, list[str]] = {}
    for each in predictions:
        place = f"{each.workload}, {each.network}, {each.ranks_per_node} ranks a node"
        lines.setdefault(place, []).append(f"{each.design} {words(each)}")
    return [f"{place}: {', '.join(texts)}" for place, texts in lines.items()]


def _fastest(steps: Sequence[Schedule], prediction: Prediction) -> str:
    """Return up to which speed of computation a design is efficient, in words; in closed form."""
    nodes = prediction.ranks // prediction.ranks_per_node
    cluster = Cluster(nodes, prediction.ranks_per_node, NETWORKS[prediction.network])
    here = [each for each in steps if each.ranks <= prediction.ranks_per_node][-1]
    enough = "none"
    for times in _SPEEDS:
        step = closed_form(here.faster(times), cluster, DESIGNS[prediction.design])
        if here.alone / times / step < ANNOUNCED:
            return enough
        enough = f"{times}"
    return f"{enough} and more"


def _what_breaks(predictions: Sequence[Prediction]) -> Iterator[str]:
    """Yield what costs most, and where, for each workload and design; but for what costs little."""
    for workload, design in dict.fromkeys((each.workload, each.design) for each in predictions):
        found: dict[str, list[tuple[float, str]]] = {}
        for each in predictions:
            if (each.workload, each.design) == (workload, design):
                parts = {name: getattr(each, name) / each.closed_form for name in _COSTS}
                name = max(parts, key=lambda name: parts[name])
                if parts[name] >= _LITTLE:
                    found.setdefault(name, []).append((parts[name], each.scenario))
        texts = [
            f"{name} " + ", ".join(f"{part:.0%} ({where})" for part, where in sorted(places)[::-1])
            for name, places in found.items()
        ]
        yield f"{workload}, {design}: {'; '.join(texts) or f'nothing costs {_LITTLE:.0%}'}"


def _what_grows(
    schedules: Mapping[str, Sequence[Schedule]], predictions: Sequence[Prediction]
) -> Iterator[str]:
    """Yield what grows with the number of ranks or of nodes, and what does not."""
    for each in predictions:
        if (each.design, each.scenario) == ("naive", _PLACE):
            tensors = len(schedules[each.workload][0].final)
            yield (
                f"{each.workload}: naive sums up {tensors} tensors one after the other, each in rounds that grow "
                f"with the logarithm of the ranks: {each.latency * 1e3:.0f} ms of latency a step on "
                f"{each.ranks:,} ranks, {_PLACE}"
            )
        elif (each.design, each.scenario) == ("overlap", _PLACE):
            yield (
                f"{each.workload}: the {DESIGNS['overlap'].comparisons} small allreduces a step in which ranks "
                f"find out whether they agree grow so, too, but not in bytes: {each.comparisons * 1e3:.1f} ms"
            )
    alone_in_flight = next(ranks for ranks in range(1, 1 << 20) if sums_in_flight(ranks) == 1)
    yield (
        f"memory of the exchange: {n_slots(1) * BLOCK_BYTES >> 20} MiB a rank, "
        f"{n_slots(64) * BLOCK_BYTES >> 20} MiB on nodes of 64, on any number of nodes; from "
        f"{alone_in_flight} ranks a node on, a node has one block under way at a time instead of "
        f"{sums_in_flight(1)}, and waits for the latency of each"
    )
    density = TopK().density
    yield (
        f"compression=TopK({density}) receives the numbers of all other nodes: from {1 / density + 1:.0f} nodes "
        "on more bytes than an exact exchange"
    )
