"""Whether an exchange went wrong on any rank, found out by all ranks together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from chainer_dist.collectives.failures import raise_together
from chainer_dist.communicators.shared_memory.between_nodes import Steps
from chainer_dist.communicators.shared_memory.slots import SETTLED

if TYPE_CHECKING:
    from types import TracebackType

    from chainer_dist.collectives.arrays import ArrayCommunicator
    from chainer_dist.communicators.shared_memory.between_nodes import Peers
    from chainer_dist.communicators.shared_memory.layout import Layout
    from chainer_dist.communicators.shared_memory.slots import Slots


class Verdict:
    """Errors of an exchange, raised at its end on every rank.

    An error is noted with the number of its block, while all blocks go on, as other ranks wait for them. At the
    end every rank of the node has seen the number, as it has waited for that block. Ranks of equal number on the
    nodes compare as soon as they have delivered the last block, and publish the result on their node.

    Args:
        comm: The communicator.
        slots: The slots of the node.
        peers: The ranks of equal number on all nodes; None on one node, and on ranks that do not reduce.
        layout: The blocks of the exchange.
    """

    def __init__(
        self, comm: ArrayCommunicator, slots: Slots, peers: Peers | None, layout: Layout
    ) -> None:
        self._comm, self._slots, self._peers = comm, slots, peers
        self._first, self._stop = slots.count, slots.count + len(layout.blocks)
        self._reducers = layout.place.reducers
        self._is_needed = layout.place.nodes > 1 and self._stop > self._first
        self._is_checked = comm.operation_log.check is not None
        self._error: BaseException | None = None
        self._is_bad = np.zeros(1, dtype=bool)  # on any of the peers' nodes
        self._asking: Steps | None = None
        self._has_told = False

    def guard(self, number: int | None, kinds: type[BaseException] = Exception) -> _Guard:
        """Return a context that notes an error instead of raising it. Local.

        Args:
            number: Number of the block, if the other ranks cannot have completed it; None if they may have, so
                that the error can no longer reach them.
            kinds: Which errors are noted; others, such as an interrupt, end the exchange on this rank at once.
        """
        return _Guard(self, number, kinds)

    def note(self, error: BaseException, number: int | None) -> None:
        """Note an error; see :meth:`guard`. Local."""
        self._error = self._error or error
        if number is not None:
            self._slots.fail(number)

    @property
    def is_known(self) -> bool:
        """Whether the other nodes' part in it is known on this node."""
        return not self._is_needed or self._slots.has_reached(SETTLED, self._stop, self._reducers)

    @property
    def is_good(self) -> bool:
        """Whether there is nothing to raise, and nothing to find out together; the same on every rank at the end."""
        return not (self._is_checked or self._slots.has_failed(self._first, self._stop))

    @property
    def is_asking(self) -> bool:
        """Whether this rank waits for other nodes."""
        return self._asking is not None and not self._has_told

    def late(self) -> str:
        """Name the ranks of the node that have not published whether blocks failed on other nodes."""
        return self._slots.behind(SETTLED, self._stop, self._reducers)

    def settle(self) -> bool:
        """Go on to compare with other nodes, and to publish on this one; return whether anything has changed. Local.

        It is for when this rank has delivered the last block.
        """
        if self._has_told or self._peers is None or not self._is_needed:
            return False
        if self._asking is None:
            self._is_bad[0] = self._slots.has_failed(self._first, self._stop)
            self._asking = Steps(self._peers.ask_all(self._is_bad))
        if not self._asking.test():
            return False
        if self._is_bad[0]:
            self._slots.fail(self._stop - 1)
        self._slots.publish(SETTLED, self._stop)
        self._has_told = True
        return True

    def close(self) -> None:
        """Raise what went wrong. Collective in checked mode, and if something went wrong.

        Raises:
            BaseException: On every rank, the error of one. On this rank alone, an error that came after all was
                published as well: outside of checked mode, while a block was unpacked.
        """
        is_good, error = self.is_good, self._error
        self._error = None
        if not is_good:
            raise_together(self._comm, error)
        elif error is not None:
            raise error


class _Guard:
    __slots__ = ("_kinds", "_number", "_verdict")

    def __init__(self, verdict: Verdict, number: int | None, kinds: type[BaseException]) -> None:
        self._verdict, self._number, self._kinds = verdict, number, kinds

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if not isinstance(error, self._kinds):
            return False
        self._verdict.note(error, self._number)
        return True
