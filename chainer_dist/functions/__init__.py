"""Communication that gradients flow through: collectives, and messages between two ranks.

Chainer functions, for models that are spread over ranks. In backward, what was sent receives its
gradient and what was received sends its gradient, so every rank has to run backward. The gradient
on a rank is that of the sum of all ranks' losses.

All of them are ordered: ``backward()`` goes through the communication of a rank in exactly the
reverse of the order in which forward did it, whatever the graph looks like. Ranks whose forward
passes fit together therefore meet in backward as well.

The names and parameters are ChainerMN's; :func:`allreduce` is new.
"""

from __future__ import annotations

from chainer_dist.functions.collective_communication import (
    allgather,
    allreduce,
    alltoall,
    bcast,
    gather,
    scatter,
)
from chainer_dist.functions.point_to_point_communication import recv, send
from chainer_dist.functions.pseudo_connect import pseudo_connect

__all__ = [
    "allgather",
    "allreduce",
    "alltoall",
    "bcast",
    "gather",
    "pseudo_connect",
    "recv",
    "scatter",
    "send",
]
