"""Memory that the ranks of a node share: slots for blocks, and counters that show how far each rank has come.

All order between what different ranks write and read is made here, by two pairs. :meth:`Slots.publish` has a
fence between what a rank has written before, to slots too, and its counter; :meth:`Slots.has_reached` has one between
the counters of others and what is read after. So a rank that has seen a counter sees all that was written before it
was published. Counters are aligned numbers of eight bytes, which processors store and load whole; the fence is MPI's
own (see :func:`~chainer_dist.communicators.shared_memory.memory.memory_fence`). Nothing else is relied on.

Checked mode looks whether that holds: the last that a rank writes to a slot before it publishes is the block's number,
a stamp, and readers compare it with the number that they want, before they read the slot and afterwards.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from chainer_dist.communicators.shared_memory.memory import memory_fence, share_memory

if TYPE_CHECKING:
    from chainer_dist._typing import Array
    from chainer_dist.collectives.arrays import ArrayCommunicator

BLOCK_BYTES = 1 << 20
# Three blocks are under way at a time: one being packed, one reduced, one unpacked. Many more slots
# than that are worth their memory where cores have no cache in common: a line that another core has
# read lately is written ten times more slowly there (2.9 against 38 GB/s on one virtual machine,
# whose two cores have or have not, from one minute to the next).
SLOTS = 12
_FEWEST_SLOTS = 4
_NODE_BYTES = 256 << 20  # that many slots may take on a node of many ranks
_MOST_IN_FLIGHT = 8

_LINE_BYTES = 64  # counters of different ranks, and kinds, are on cache lines of their own
# What a rank has done with so many blocks, counted over all exchanges. An exchange is settled when a rank knows
# whether it went wrong on other nodes.
PACKED, REDUCED, UNPACKED, SETTLED, _FAILED = (i * _LINE_BYTES // 8 for i in range(5))
_COUNTER_BYTES = 5 * _LINE_BYTES
_STAMP_BYTES = _LINE_BYTES  # of a slot: one for what was packed, one for what was reduced


def n_slots(ranks: int) -> int:
    """Return how many blocks of its own a rank can have under way, on a node of so many. Local."""
    return max(_FEWEST_SLOTS, min(SLOTS, _NODE_BYTES // (ranks * BLOCK_BYTES)))


def sums_in_flight(ranks: int) -> int:
    """Return how many sums between nodes are under way at a time, unless tuned. Local.

    So many keep the links busy while ranks pack and unpack other blocks.

    Args:
        ranks: Number of ranks of a node.
    """
    return max(1, min(_MOST_IN_FLIGHT, n_slots(ranks) - _FEWEST_SLOTS))


class Slots:
    """The slots and counters of all ranks of a node. Creating them is collective, all else is local.

    Args:
        comm: The communicator, each node of which gets memory of its own.

    Attributes:
        rank: This rank's number on the node.
        ranks: How many ranks the node has.
        depth: How many slots each rank has.
        block_bytes: Bytes of a slot.
        have_cores: Whether the node has a core for each rank, so that ranks may spin.
        scratch: This rank's own memory of the size of a slot, as bytes.
        count: Number of the blocks of all exchanges that have ended; the same on every rank.
    """

    def __init__(self, comm: ArrayCommunicator) -> None:
        node = comm.node_comm
        self.rank, self.ranks = node.rank, node.size
        self.depth, self.block_bytes = n_slots(node.size), BLOCK_BYTES
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(1)
        self.have_cores = node.size <= len(cores)
        self.count = 0
        self._is_occupied = False
        data_bytes = self.depth * self.block_bytes
        own_bytes = _COUNTER_BYTES + self.depth * _STAMP_BYTES
        shared = share_memory(comm, node.size * (data_bytes + own_bytes))
        data, counters = np.split(shared, [node.size * data_bytes])
        self._data = list(data.reshape(node.size, -1))
        # Elements of a memoryview are read and written faster than elements of an array.
        self._counters = [each.data.cast("q") for each in counters.reshape(node.size, -1)]
        self._fence = memory_fence()
        self.scratch = np.empty(self.block_bytes, dtype=np.uint8)
        self._names = node.allgather(comm.rank)

    def occupy(self) -> None:
        """Begin an exchange, of which there is one at a time.

        Raises:
            RuntimeError: If an earlier one has not come to its end.
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
            blocks: How many blocks it had.
        """
        self._is_occupied = False
        self.count += blocks

    def views(self, dtype: np.dtype[Any]) -> list[Array]:
        """Return for each rank of the node its slots, an array of shape ``(depth, n)``."""
        return [each.view(dtype).reshape(self.depth, -1) for each in self._data]

    def publish(self, stage: int, count: int) -> None:
        """Publish that this rank has come to ``count`` blocks, and has written what belongs to them.

        Args:
            stage: ``PACKED``, ``REDUCED``, ``UNPACKED`` or ``SETTLED``.
            count: Number of blocks, counted over all exchanges.
        """
        self._fence()
        self._counters[self.rank][stage] = count

    def has_reached(self, stage: int, count: int, ranks: int) -> bool:
        """Return whether the first ranks of the node have come to ``count`` blocks; if so, read what they wrote.

        Args:
            stage: See :meth:`publish`.
            count: See :meth:`publish`.
            ranks: How many of the ranks.
        """
        for counters in self._counters[:ranks]:
            if counters[stage] < count:
                return False
        self._fence()
        return True

    def behind(self, stage: int, count: int, ranks: int) -> str:
        """Name the ranks that :meth:`has_reached` waits for; an empty string if there are none."""
        late = [self._names[i] for i in range(ranks) if self._counters[i][stage] < count]
        return f"rank {', '.join(map(str, late))}" if late else ""

    def fail(self, number: int) -> None:
        """Note that a block went wrong here. Other ranks see that with what is published next.

        Args:
            number: The block's number, counted over all exchanges from 0.
        """
        self._counters[self.rank][_FAILED] = number + 1

    def has_failed(self, first: int, stop: int) -> bool:
        """Return whether a block of ``range(first, stop)`` went wrong on a rank of the node.

        What went wrong in a later exchange, which a faster rank may have begun, does not count.
        """
        return any(first < counters[_FAILED] <= stop for counters in self._counters)

    def stamp(self, stage: int, number: int) -> None:
        """Write the number of a block to this rank's slot, behind its data: ``PACKED`` or ``REDUCED``."""
        self._counters[self.rank][self._stamp(stage, number)] = number + 1

    def check_stamp(self, stage: int, number: int, rank: int) -> None:
        """Raise RuntimeError if a slot, whose counter was seen, is not that of this block.

        Args:
            stage: See :meth:`stamp`.
            number: Number of the block.
            rank: Rank of the node whose slot is read.
        """
        self._fence()  # what was read before was read before the stamp
        found = self._counters[rank][self._stamp(stage, number)] - 1
        if found != number:
            raise RuntimeError(
                f"the slot of rank {self._names[rank]} has block {found} where block {number} was announced: this "
                "machine does not keep the order in which ranks write to shared memory; use the communicator 'flat', "
                "and report this as a bug with the kind of processor and the version of MPI"
            )

    def _stamp(self, stage: int, number: int) -> int:
        return (_COUNTER_BYTES + number % self.depth * _STAMP_BYTES) // 8 + (stage == REDUCED)

    def free(self) -> None:
        """Let go of the memory."""
        self._counters, self._data = [], []
