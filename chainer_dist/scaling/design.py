"""How gradients are exchanged: designs, and the messages that each of them makes of a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from chainer_dist.communicators.shared_memory.between_nodes import MOST_NODES
from chainer_dist.communicators.shared_memory.slots import BLOCK_BYTES, sums_in_flight

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainer_dist.scaling.cluster import Cluster
    from chainer_dist.scaling.schedule import Schedule

__all__ = [
    "COMPARISON",
    "DESIGNS",
    "SHORT",
    "Design",
    "Message",
    "direct_steps",
    "is_direct",
    "messages_of",
    "seconds_of_update",
]


SHORT = 2048  # bytes that MPICH sums up by recursive doubling: in half as many rounds
_PAIR = 2  # nodes that send each other everything
COMPARISON = 128  # bytes that ranks sum up to find out whether they agree
_MESSAGES = 24  # of an overlapped step; more only where the code waits for more one after the other


class Design(NamedTuple):
    """How gradients are exchanged, and parameters updated.

    Attributes:
        by_tensor: Each gradient in messages of its own; otherwise packed.
        overlaps: While backward computes others.
        width: Bytes sent for one byte of a gradient.
        by_node: Ranks of a node exchange each a slice, and update each a slice; otherwise all ranks of all
            nodes exchange, and update, everything.
        comparisons: In how many small allreduces of a step all ranks find out whether they agree.
    """

    by_tensor: bool
    overlaps: bool
    width: float
    by_node: bool
    comparisons: int


DESIGNS = {
    "naive": Design(by_tensor=True, overlaps=False, width=1.0, by_node=False, comparisons=0),
    "flat": Design(by_tensor=False, overlaps=False, width=1.0, by_node=False, comparisons=0),
    "multi-leader": Design(by_tensor=False, overlaps=False, width=1.0, by_node=True, comparisons=2),
    "overlap": Design(by_tensor=False, overlaps=True, width=1.0, by_node=True, comparisons=3),
    "float16": Design(by_tensor=False, overlaps=True, width=0.5, by_node=True, comparisons=3),
}


class Message(NamedTuple):
    """Something to exchange: when it is there, in seconds from the beginning of the step, and its bytes."""

    ready: float
    nbytes: int


def messages_of(schedule: Schedule, cluster: Cluster, design: Design) -> list[Message]:
    """Return what is exchanged in a step, in its order, one after the other."""
    final = [Message(schedule.forward + moment, size) for moment, size in schedule.final]
    if not design.overlaps:
        final = [each._replace(ready=schedule.compute) for each in final]
    if not design.by_tensor:
        final = list(_joined(final, _together(schedule.nbytes, cluster, design)))
    return [each._replace(nbytes=round(each.nbytes * design.width)) for each in final]


def _together(nbytes: int, cluster: Cluster, design: Design) -> int:
    """Return bytes of gradients that are exchanged together.

    Ranks of a node exchange blocks, of which several are on their way at a time; here as many are one
    message. Of a step that overlaps there are some more, so as not to lose when each gradient is there.
    """
    if not design.by_node:
        return max(nbytes, 1)
    together = BLOCK_BYTES * sums_in_flight(cluster.ranks)
    return max(min(together, nbytes // _MESSAGES), BLOCK_BYTES) if design.overlaps else together


def _joined(final: list[Message], together: int) -> Iterator[Message]:
    """Join and cut messages to some of so many bytes each."""
    nbytes = 0
    for each in final:
        nbytes += each.nbytes
        while nbytes >= together:
            yield Message(each.ready, together)
            nbytes -= together
    if nbytes:
        yield Message(final[-1].ready, nbytes)


def seconds_of_update(schedule: Schedule, design: Design) -> float:
    """Return the seconds of what a rank does besides computation and exchange between nodes."""
    return schedule.node_update if design.by_node else schedule.update


def is_direct(nodes: int, design: Design) -> bool:
    """Return whether nodes send each other their slices of a message, as in ``DirectSum``. Local."""
    return design.by_node and 1 < nodes <= MOST_NODES


def direct_steps(nodes: int, nbytes: float) -> list[float]:
    """Return what each node sends to each other one in each step of a direct sum, in bytes."""
    return [nbytes] if nodes == _PAIR else [nbytes / nodes] * 2
