"""The agreement of all ranks on whether an exchange failed on any of them."""

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

    An error is recorded with the number of its block, and the exchange continues, as other ranks wait for its
    blocks. At the end every rank of the node has seen the number, since it has waited for that block. Ranks of equal
    number on the nodes compare as soon as they have delivered the last block, and publish the result on their node.

    More than ten attributes: half describe the exchange, and half are what was found so far.

    Args:
        comm: The communicator.
        slots: The slots of the node.
        peers: The ranks of equal number on all nodes; None on one node, and on ranks that do not reduce.
        layout: Layout of the exchange.
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
        """Return a context that records an error instead of raising it. Local.

        Args:
            number: Number of the block. None if the other ranks may have completed the block already, so that
                the error cannot reach them.
            kinds: Class of the errors that are recorded. Others, such as an interrupt, end the exchange on this
                rank at once.
        """
        return _Guard(self, number, kinds)

    def note(self, error: BaseException, number: int | None) -> None:
        """Record an error; see :meth:`guard`. Local."""
        self._error = self._error or error
        if number is not None:
            self._slots.fail(number)

    @property
    def is_known(self) -> bool:
        """Whether this node knows whether the exchange failed on other nodes."""
        return not self._is_needed or self._slots.has_reached(SETTLED, self._stop, self._reducers)

    @property
    def is_good(self) -> bool:
        """Whether :meth:`close` has no error to raise or find out; the same on every rank at the end."""
        return not (self._is_checked or self._slots.has_failed(self._first, self._stop))

    @property
    def is_asking(self) -> bool:
        """Whether this rank waits for other nodes."""
        return self._asking is not None and not self._has_told

    def late(self) -> str:
        """Return the names of the node's ranks that have not published whether other nodes failed."""
        return self._slots.behind(SETTLED, self._stop, self._reducers)

    def settle(self) -> bool:
        """Advance the comparison with other nodes, and publish its result on this node. Local.

        It is called after this rank has delivered the last block.

        Returns:
            Whether the result was published now.
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
        """Raise the error of the exchange, if there is one. Collective in checked mode, and if there is one.

        Raises:
            BaseException: On every rank, an error of one rank. An error while a block is unpacked, which comes
                too late for the others, is raised on this rank alone outside of checked mode.
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
