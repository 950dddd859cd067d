"""The options of an update, which a user chooses when the multi-node optimizer is made."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

from chainer_dist.compression.quantized import as_codec

if TYPE_CHECKING:
    from chainer_dist.compression import Compression, Rounded

__all__ = ["JOB", "Options", "Schedule"]

JOB = "job"  # the value of sharded_update that shards over the ranks of all nodes


@dataclasses.dataclass
class Schedule:
    """When ranks that update alone average; see :func:`chainer_dist.create_local_sgd_optimizer`.

    Attributes:
        period: Number of updates from one averaging to the next.
        warmup_updates: Number of first updates that average gradients.
        average_state: Whether the state of the update rules is averaged as well.
    """

    period: int = 1
    warmup_updates: int = 0
    average_state: bool = False


class Options(NamedTuple):
    """Options of an update; see :func:`chainer_dist.create_multi_node_optimizer`.

    Attributes:
        sharded_update: Whether the update is sharded; None for where that is possible, :data:`JOB` for
            an update that is sharded over the ranks of all nodes.
        mean_grad: Whether a sharded update leaves the mean in ``param.grad``.
        share_parameters: Whether a sharded update keeps parameters once per node.
        compression: Compression of gradients between nodes; None for exact means.
        accumulate_steps: Initial number of calls that make one update.
        overlap: Whether gradients are exchanged during backward; None for where that pays.
        kind: Name of the update in :data:`~chainer_dist.updates.UPDATES`. None chooses the sharded update
            where it is possible and ``sharded_update`` allows it, and otherwise the replicated one.
        schedule: Schedule of local SGD; None for any other kind of update.
    """

    sharded_update: bool | str | None = None
    mean_grad: bool = False
    share_parameters: bool = False
    compression: Compression | None = None
    accumulate_steps: int = 1
    overlap: bool | None = None
    kind: str | None = None
    schedule: Schedule | None = None

    @property
    def code(self) -> Rounded | None:
        """The codec, if the compression is only a codec of single numbers, and otherwise None."""
        return as_codec(self.compression)
