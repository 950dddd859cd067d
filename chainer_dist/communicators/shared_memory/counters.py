"""Counters that the ranks of a node share, by which each shows the others how far it has come.

Two methods establish all order between writes and reads of different ranks. :meth:`Counters.publish` has a fence
between earlier writes of a rank, to any shared memory, and its counter. :meth:`Counters.has_reached` has a fence
between the counters of other ranks and later reads. So a rank that has seen a counter sees all writes from before that
counter was published. Counters are aligned numbers of eight bytes, which processors store and load at once. The fence
is MPI's own (see :func:`~chainer_dist.communicators.shared_memory.memory.memory_fence`). The code relies on nothing
else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainer_dist.communicators.shared_memory.memory import memory_fence

if TYPE_CHECKING:
    from chainer_dist._typing import Array
    from chainer_dist.collectives.arrays import ArrayCommunicator


class Counters:
    """Counters of all ranks of a node. Creating them is collective; all methods are local.

    Args:
        comm: The communicator, each node of which has counters of its own.
        memory: Zeroed memory that the ranks of the node share, as bytes: as many for each rank, in the order of rank.
            Numbers that are no counters may be in it as well.

    Attributes:
        rank: Number of this rank on the node.
        ranks: Number of ranks of the node.
        numbers: For each rank, its memory as numbers of eight bytes.
    """

    def __init__(self, comm: ArrayCommunicator, memory: Array) -> None:
        node = comm.node_comm
        self.rank, self.ranks = node.rank, node.size
        # Elements of a memoryview are read and written faster than elements of an array.
        self.numbers = [each.data.cast("q") for each in memory.reshape(node.size, -1)]
        self._fence = memory_fence()
        self._names = node.allgather(comm.rank)

    def publish(self, counter: int, count: int) -> None:
        """Set a counter of this rank, once all its earlier writes can be seen.

        Args:
            counter: Position of the counter among the numbers of the rank.
            count: Its new value.
        """
        self._fence()
        self.numbers[self.rank][counter] = count

    def has_reached(self, counter: int, count: int, ranks: int) -> bool:
        """Return whether a counter has reached ``count`` on the first ranks of the node.

        If so, later reads of this rank see what these ranks have written before that.

        Args:
            counter: See :meth:`publish`.
            count: Least value.
            ranks: Number of ranks that count.
        """
        for numbers in self.numbers[:ranks]:
            if numbers[counter] < count:
                return False
        self._fence()
        return True

    def behind(self, counter: int, count: int, ranks: int) -> str:
        """Return the names of the ranks for which :meth:`has_reached` is False, or an empty string."""
        late = [self._names[i] for i in range(ranks) if self.numbers[i][counter] < count]
        return f"rank {', '.join(map(str, late))}" if late else ""

    def free(self) -> None:
        """Drop this rank's references to the memory."""
        self.numbers = []
