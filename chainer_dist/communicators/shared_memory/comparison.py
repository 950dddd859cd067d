"""Numbers that the ranks of a node compare through shared memory, without a message."""

from __future__ import annotations

import array
from typing import TYPE_CHECKING

from chainer_dist.collectives.group import ROOM
from chainer_dist.communicators.shared_memory.memory import memory_fence, share_memory
from chainer_dist.communicators.shared_memory.waiting import have_cores, wait_until

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainer_dist.collectives.arrays import ArrayCommunicator

_LINE = 8  # numbers of a cache line


class Comparison:
    """Shared memory in which each rank of a node writes its numbers. Creating it is collective.

    A rank writes its numbers first and then, after a fence, how many comparisons it has come to; so whoever has read
    that count reads those numbers. It has two places for numbers, in turn: it cannot come to the comparison after the
    next one before all others have come to the next one, and have read what this one was about.

    Args:
        comm: The communicator, all ranks of which are on one node.
        patient: Whether to sleep rather than spin while waiting.
    """

    def __init__(self, comm: ArrayCommunicator, *, patient: bool) -> None:
        self._comm, self._patient = comm, patient
        item_bytes = array.array("q").itemsize
        shared = share_memory(comm, comm.size * (_LINE + 2 * ROOM) * item_bytes)
        # Elements of a memoryview are read and written faster than elements of an array.
        self._ranks = [each.data.cast("q") for each in shared.reshape(comm.size, -1)]
        self._own = self._ranks[comm.rank]
        self._others = [each for each in self._ranks if each is not self._own]
        self._fence = memory_fence()
        self._spins = have_cores(comm.size)

    def extremes(self, numbers: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
        """See :meth:`~chainer_dist.collectives.group.Group.extremes`. Collective."""
        # Nothing but shared memory counts, so that an interrupt leaves this rank in step.
        count = self._own[0] + 1
        start = _LINE + count % 2 * ROOM
        stop = start + len(numbers)
        mine = self._own[start:stop]
        mine[:] = array.array("q", numbers)
        self._fence()
        self._own[0] = count
        if not self._have_all_come():
            wait_until(
                self._have_all_come,
                self._comm,
                self._describe_late,
                spins=self._spins,
                patient=self._patient,
            )
        self._fence()
        others = [each[start:stop] for each in self._others]
        if all(other == mine for other in others):
            return numbers, numbers
        columns = list(zip(mine, *others))
        return list(map(max, columns)), list(map(min, columns))

    def _have_all_come(self) -> bool:
        count = self._own[0]
        return all(other[0] >= count for other in self._others)

    def _describe_late(self) -> str:
        count = self._own[0]
        late = [str(rank) for rank, each in enumerate(self._ranks) if each[0] < count]
        return f"rank {', '.join(late)}"

    def free(self) -> None:
        """Let go of the memory. Local."""
        del self._own
        self._ranks, self._others = [], []
