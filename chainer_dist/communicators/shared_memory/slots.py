"""Memory that the ranks of a node share: slots for blocks, and counters that show the progress of each rank.

The counters keep order between writes and reads of different ranks, also of slots; see
:mod:`~chainer_dist.communicators.shared_memory.counters`.

Checked mode tests this: the last write of a rank to a slot, before it publishes, is a stamp with the number of the
block. Readers compare the stamp with the number that they expect, before they read the slot and afterwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from chainer_dist.communicators.shared_memory.counters import Counters
from chainer_dist.communicators.shared_memory.memory import share_memory
from chainer_dist.communicators.shared_memory.waiting import have_cores

if TYPE_CHECKING:
    from chainer_dist._typing import Array
    from chainer_dist.collectives.arrays import ArrayCommunicator

BLOCK_BYTES = 1 << 20
# Three blocks are under way at a time: one is packed, one reduced and one unpacked. Many more slots are worth
# their memory where cores share no cache: there, writes to a cache line that another core has just read are ten
# times slower (2.9 against 38 GB/s on one virtual machine, whose two cores share a cache or not, from one minute
# to the next).
SLOTS = 12
_FEWEST_SLOTS = 4
_NODE_BYTES = 256 << 20  # most bytes of all slots on a node of many ranks
_MOST_IN_FLIGHT = 8

_LINE_BYTES = 64  # counters of different ranks and stages are on separate cache lines
# Stages, by the position of their counters. A counter has the number of blocks that have passed the stage on a rank,
# over all exchanges. A block is settled once a rank knows whether its exchange failed on other nodes.
PACKED, REDUCED, UNPACKED, SETTLED, _FAILED = (i * _LINE_BYTES // 8 for i in range(5))
_COUNTER_BYTES = 5 * _LINE_BYTES
_STAMP_BYTES = _LINE_BYTES  # of a slot: one stamp for its packed block, one for its reduced block


def n_slots(ranks: int) -> int:
    """Return how many slots each rank has on a node of ``ranks`` ranks. Local."""
    return max(_FEWEST_SLOTS, min(SLOTS, _NODE_BYTES // (ranks * BLOCK_BYTES)))


def sums_in_flight(ranks: int) -> int:
    """Return how many sums between nodes are under way at a time, unless tuned. Local.

    This number keeps the network busy while ranks pack and unpack other blocks.

    Args:
        ranks: Number of ranks of a node.
    """
    return max(1, min(_MOST_IN_FLIGHT, n_slots(ranks) - _FEWEST_SLOTS))


class Slots(Counters):
    """The slots and counters of all ranks of a node. Creating them is collective; all methods are local.

    Args:
        comm: The communicator, each node of which gets memory of its own.

    Attributes:
        depth: Number of slots of each rank.
        block_bytes: Number of bytes of a slot.
        have_cores: Whether the node has a core for each rank, so that ranks may spin.
        scratch: Memory of this rank alone, of the size of a slot, as bytes.
        count: Number of blocks of all exchanges that have ended; the same on every rank.

    Raises:
        OSError: On every rank, if a node has no room for the memory.
    """

    def __init__(self, comm: ArrayCommunicator) -> None:
        ranks = comm.node_comm.size
        self.depth, self.block_bytes = n_slots(ranks), BLOCK_BYTES
        self.have_cores = have_cores(ranks)
        self.count = 0
        self._is_occupied = False
        data_bytes = self.depth * self.block_bytes
        own_bytes = _COUNTER_BYTES + self.depth * _STAMP_BYTES
        shared = share_memory(comm, ranks * (data_bytes + own_bytes))
        data, counters = np.split(shared, [ranks * data_bytes])
        super().__init__(comm, counters)
        self._data = list(data.reshape(ranks, -1))
        self._views: dict[np.dtype[Any], list[Array]] = {}
        self.scratch = np.empty(self.block_bytes, dtype=np.uint8)

    def occupy(self) -> None:
        """Begin an exchange; there can be only one at a time.

        Raises:
            RuntimeError: If an earlier exchange has not ended.
        """
        if self._is_occupied:
            raise RuntimeError(
                "an exchange of this communicator has not come to its end: either this is called "
                "while gradients are exchanged during backward, or an error ended an exchange on "
                "this rank; after an error create a new communicator"
            )
        self._is_occupied = True

    def release(self, blocks: int) -> None:
        """End an exchange.

        Args:
            blocks: Number of its blocks.
        """
        self._is_occupied = False
        self.count += blocks

    def views(self, dtype: np.dtype[Any]) -> list[Array]:
        """Return the slots of each rank of the node as an array of shape ``(depth, n)``."""
        if dtype not in self._views:
            self._views[dtype] = [each.view(dtype).reshape(self.depth, -1) for each in self._data]
        return self._views[dtype]

    def fail(self, number: int) -> None:
        """Record that a block failed on this rank. Other ranks see that together with the next published counter.

        Args:
            number: Number of the block, counted over all exchanges from 0.
        """
        self.numbers[self.rank][_FAILED] = number + 1

    def has_failed(self, first: int, stop: int) -> bool:
        """Return whether a block of ``range(first, stop)`` failed on a rank of the node.

        Failures in a later exchange, which a faster rank may have begun, do not count.
        """
        return any(first < numbers[_FAILED] <= stop for numbers in self.numbers)

    def stamp(self, stage: int, number: int) -> None:
        """Stamp this rank's slot with the number of a block, after its data.

        Args:
            stage: Stage of the data: ``PACKED`` or ``REDUCED``.
            number: Number of the block.
        """
        self.numbers[self.rank][self._stamp(stage, number)] = number + 1

    def check_stamp(self, stage: int, number: int, rank: int) -> None:
        """Check that a slot has the block that its rank has published.

        Args:
            stage: Stage; see :meth:`stamp`.
            number: Number of the block.
            rank: Rank of the node whose slot is read.

        Raises:
            RuntimeError: If the slot has another block.
        """
        self._fence()  # earlier reads come before the read of the stamp
        found = self.numbers[rank][self._stamp(stage, number)] - 1
        if found != number:
            raise RuntimeError(
                f"the slot of rank {self._names[rank]} has block {found} where block {number} was announced: this "
                "machine does not keep the order in which ranks write to shared memory; use the communicator 'flat', "
                "and report this as a bug with the kind of processor and the version of MPI"
            )

    def _stamp(self, stage: int, number: int) -> int:
        return (_COUNTER_BYTES + number % self.depth * _STAMP_BYTES) // 8 + (stage == REDUCED)

    def free(self) -> None:
        """Drop this rank's references to the memory."""
        super().free()
        self._data, self._views = [], {}
