"""Numbers that the ranks of a node compare through shared memory, without a message."""

from __future__ import annotations

import array
from typing import TYPE_CHECKING

from chainer_dist.collectives.group import ROOM
from chainer_dist.communicators.shared_memory.counters import Counters
from chainer_dist.communicators.shared_memory.memory import share_memory
from chainer_dist.communicators.shared_memory.waiting import have_cores, wait_until

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainer_dist.collectives.arrays import ArrayCommunicator

_COUNT = 0  # position of the counter of comparisons to which a rank has come
_LINE = 8  # numbers of a cache line


class Comparison(Counters):
    """Shared memory in which each rank of a node writes its numbers. Creating it is collective.

    A rank writes its numbers first, and then publishes how many comparisons it has come to. It has two places for
    numbers, in turn: it cannot come to the comparison after the next one before all others have come to the next one,
    and have read what this one was about.

    Args:
        comm: The communicator, all ranks of which are on one node.
        patient: Whether to sleep rather than spin while waiting.
    """

    def __init__(self, comm: ArrayCommunicator, *, patient: bool) -> None:
        self._comm, self._patient = comm, patient
        item_bytes = array.array("q").itemsize
        super().__init__(comm, share_memory(comm, comm.size * (_LINE + 2 * ROOM) * item_bytes))
        self._spins = have_cores(comm.size)

    def extremes(self, numbers: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
        """See :meth:`~chainer_dist.collectives.group.Group.extremes`. Collective."""
        # Nothing but shared memory counts, so that an interrupt leaves this rank in step.
        own, ranks = self.numbers[self.rank], self.ranks
        count = own[_COUNT] + 1
        start = _LINE + count % 2 * ROOM
        stop = start + len(numbers)
        own[start:stop] = array.array("q", numbers)
        self.publish(_COUNT, count)
        if not self.has_reached(_COUNT, count, ranks):
            wait_until(
                lambda: self.has_reached(_COUNT, count, ranks),
                self._comm,
                lambda: self.behind(_COUNT, count, ranks),
                spins=self._spins,
                patient=self._patient,
            )
        rows = [each[start:stop].tolist() for each in self.numbers]
        if rows.count(rows[0]) == ranks:
            return numbers, numbers
        columns = list(zip(*rows))
        return list(map(max, columns)), list(map(min, columns))
