"""The cluster on which a step is to take place: its nodes, their network, and how ranks differ."""

from __future__ import annotations

import statistics
from typing import NamedTuple

__all__ = ["NETWORKS", "Cluster", "Network", "scores"]


class Network(NamedTuple):
    """What joins nodes: bytes a second of a node's link, and seconds from one node to another.

    As ping-pongs between processes give them, not as they are printed on the box.
    """

    bandwidth: float
    latency: float


NETWORKS = {
    "1 Gbit/s Ethernet": Network(0.117e9, 50e-6),
    "10 Gbit/s Ethernet": Network(1.17e9, 30e-6),
    "100 Gbit/s Ethernet": Network(11.5e9, 10e-6),
    "InfiniBand HDR": Network(24e9, 1.5e-6),
}


class Cluster(NamedTuple):
    """Where a step is replayed.

    Attributes:
        nodes: How many.
        ranks: Of each node.
        network: That joins them.
        straggler: How many times as long as on the others a step's computation takes on the first node.
        jitter: The standard deviation of the time that ranks compute, each for itself and in each step
            anew, as a part of that time. Normally distributed.
        oversubscription: How many times as fast the nodes' links are, together, as the one that they share;
            1 if none is shared.
    """

    nodes: int
    ranks: int
    network: Network
    straggler: float = 1.0
    jitter: float = 0.0
    oversubscription: float = 1.0


def scores(cluster: Cluster) -> list[float]:
    """Return what normally distributed numbers, one a rank, are expected to be, sorted (Blom, 1958)."""
    if not cluster.jitter:
        return [0.0]
    size, normal = cluster.nodes * cluster.ranks, statistics.NormalDist()
    return [normal.inv_cdf((number + 0.625) / (size + 0.25)) for number in range(size)]
