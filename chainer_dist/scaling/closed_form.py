"""The seconds of a step in closed form, and how many of them each cause costs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from chainer_dist.scaling.cluster import scores
from chainer_dist.scaling.design import (
    COMPARISON,
    SHORT,
    direct_steps,
    is_direct,
    messages_of,
    seconds_of_update,
)

if TYPE_CHECKING:
    from chainer_dist.scaling.cluster import Cluster
    from chainer_dist.scaling.design import Design
    from chainer_dist.scaling.schedule import Schedule

__all__ = ["closed_form", "costs"]


def closed_form(schedule: Schedule, cluster: Cluster, design: Design) -> float:
    """Return the seconds of a step by the model of Hockney (1994): latency and bandwidth alone. Local.

    An allreduce of n bytes among p nodes, a power of two, takes ``2 log2(p)`` latencies and
    ``2 n (p - 1) / p`` bytes of a link, a short one half as many latencies and ``log2(p) n`` bytes of each
    rank that exchanges; among another number of nodes ``2`` latencies and ``2 n`` bytes more. A direct sum
    takes as many bytes and 2 latencies, between two nodes 1. Messages do not meet on the network.
    """
    slowest = max(cluster.straggler, 1 + cluster.jitter * max(scores(cluster)))
    comparison = _allreduce_seconds(cluster, design, COMPARISON)
    before = comparison * max(design.comparisons - 1, 0)  # between forward and backward
    end = before
    for ready, nbytes in messages_of(schedule, cluster, design):
        end = max(end, before + ready * slowest) + _exchange(cluster, design, nbytes)
    end = max(end, before + schedule.compute * slowest)
    return end + comparison * min(design.comparisons, 1) + seconds_of_update(schedule, design)


def _exchange(cluster: Cluster, design: Design, nbytes: float) -> float:
    """Return the seconds that gradients take to be summed up, in closed form."""
    nodes, network = cluster.nodes, cluster.network
    if not is_direct(nodes, design):
        return _allreduce_seconds(cluster, design, nbytes)
    bandwidth = network.bandwidth / cluster.oversubscription
    sent = direct_steps(nodes, nbytes)
    return sum(network.latency + (nodes - 1) * each / bandwidth for each in sent)


def _allreduce_seconds(cluster: Cluster, design: Design, nbytes: float) -> float:
    """Return the seconds of an allreduce in closed form; what passes within a node takes none."""
    if cluster.nodes == 1:
        return 0.0
    latency, bandwidth = cluster.network.latency, cluster.network.bandwidth
    bandwidth /= cluster.oversubscription
    rounds = cluster.nodes.bit_length() - 1
    senders = 1 if design.by_node else cluster.ranks  # of all there is, of each node
    if nbytes <= SHORT:
        seconds = rounds * (latency + senders * nbytes / bandwidth)
    else:
        seconds = 2 * rounds * latency + 2 * nbytes * (1 - 0.5**rounds) / bandwidth
    if cluster.nodes != 1 << rounds:  # some send everything, and get it back
        seconds += 2 * (latency + senders * nbytes / bandwidth)
    return seconds


def costs(schedule: Schedule, cluster: Cluster, design: Design) -> dict[str, float]:
    """Return by how many seconds a step would be shorter, in closed form, if something cost nothing. Local.

    Returns:
        ``latency`` and ``bandwidth`` of the network, ``waiting`` for ranks that compute longer, and
        ``comparisons``, which are latency too. What is hidden behind computation costs nothing.
    """
    network = cluster.network
    step = closed_form(schedule, cluster, design)
    without = {
        "latency": (cluster._replace(network=network._replace(latency=0.0)), design),
        "bandwidth": (cluster._replace(network=network._replace(bandwidth=math.inf)), design),
        "waiting": (cluster._replace(straggler=1.0, jitter=0.0), design),
        "comparisons": (cluster, design._replace(comparisons=0)),
    }
    return {name: step - closed_form(schedule, *each) for name, each in without.items()}
