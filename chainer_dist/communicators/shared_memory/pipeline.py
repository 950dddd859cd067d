"""The pipeline by which blocks of arrays pass through the slots of a node.

Each rank copies a block of its arrays into memory that all ranks of the node share, sums its own slice of
the block over all ranks, and copies the other slices of the result back. Blocks are so small that they stay
in the cache meanwhile, so an array is read from memory once and written once. Blocks follow one another
without a barrier: counters in the shared memory show the progress of each rank.
"""

from __future__ import annotations

import collections
import itertools
from typing import TYPE_CHECKING, cast

from chainer_dist.collectives.operation import (
    EXCHANGE,
    PACK,
    UNPACK,
    Kind,
    Operation,
    innermost,
)
from chainer_dist.communicators.shared_memory.slots import PACKED, REDUCED, UNPACKED
from chainer_dist.communicators.shared_memory.sums import Sums
from chainer_dist.communicators.shared_memory.verdict import Verdict
from chainer_dist.communicators.shared_memory.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainer_dist._typing import Array
    from chainer_dist.collectives.arrays import ArrayCommunicator
    from chainer_dist.communicators.shared_memory.between_nodes import Peers, Steps
    from chainer_dist.communicators.shared_memory.exchange import Exchange
    from chainer_dist.communicators.shared_memory.slots import Slots

_RUN = Kind("exchange in shared memory", EXCHANGE)


class Pipeline:
    """An exchange in progress, block by block. All ranks of the communicator begin it and finish it.

    Blocks are packed, reduced, delivered and unpacked. Each of these four stages is a block or more behind
    the one before, so that ranks seldom wait. Sums between nodes are nonblocking, and several are under way
    at a time.

    More than fifteen methods and ten attributes: each stage has a method that does its work and one that says whether
    it may, and a count of its blocks; the others are parts of the description that every block reads.

    Args:
        comm: The communicator.
        slots: The slots of the node.
        peers: The ranks of equal number on all nodes; None on one node, and on ranks that do not reduce.
        exchange: Description of the exchange.
        in_flight: Number of sums between nodes that are under way at a time.
        patient: Whether to sleep rather than spin while waiting.

    Raises:
        RuntimeError: If an earlier exchange has not come to its end.
    """

    def __init__(
        self,
        comm: ArrayCommunicator,
        slots: Slots,
        peers: Peers | None,
        exchange: Exchange,
        *,
        in_flight: int,
        patient: bool,
    ) -> None:
        slots.occupy()
        self._comm, self._slots, self._peers, self._exchange = comm, slots, peers, exchange
        self._layout, self._blocks = exchange.layout, exchange.layout.blocks
        self._reducers = exchange.layout.place.reducers
        # An entry is None only until its block is ready, before which it is not read.
        self._sources = cast("Sequence[Array] | None", exchange.sources)
        self._in_flight, self._patient = in_flight, patient
        self._is_checked = comm.operation_log.check is not None
        self._blank = exchange.blank()
        self._data = slots.views(exchange.dtype)
        self._sums = Sums(slots, self._data, peers, exchange, comm.size)
        self._verdict = Verdict(comm, slots, peers, exchange.layout)
        self._first = slots.count  # the number of the first block
        self._packed = self._summed = self._delivered = self._unpacked = 0  # numbers of blocks
        self._on_the_way: collections.deque[Steps] = collections.deque()  # sums between nodes
        outer = innermost()
        self._caller = _RUN if outer is None else outer.kind

    def advance(self) -> bool:
        """Do all work that needs no waiting, and return whether there was any. Local."""
        moved = False
        while True:
            while self._pack():
                moved = True
            if not (self._sum() | self._deliver() | self._settle() | self._unpack()):
                return moved
            moved = True

    @property
    def is_done(self) -> bool:
        """Whether only :meth:`end` is left to do; False if :meth:`finish` has an error to raise."""
        return self._has_passed and self._verdict.is_good

    @property
    def _has_passed(self) -> bool:
        """Whether this rank has unpacked all blocks, and knows whether other nodes had an error."""
        return self._unpacked == len(self._blocks) and self._verdict.is_known

    def finish(self) -> None:
        """Do the rest of the exchange. Collective.

        Raises:
            BaseException: On every rank, an error of one rank.
        """
        with Operation(_RUN, self._comm):
            while not self._has_passed:
                wait_until(
                    lambda: self.advance() or self._has_passed,
                    self._comm,
                    self._awaited,
                    spins=self._slots.have_cores,
                    patient=self._patient,
                )
            self.end()

    def end(self) -> None:
        """Free the slots for the next exchange. Collective in checked mode, and if there was an error.

        Raises:
            BaseException: On every rank, an error of one rank.
        """
        self._slots.release(len(self._blocks))
        self._verdict.close()

    def _awaited(self) -> str:
        """Return the names of the ranks for which this rank waits. Local."""
        slots, first = self._slots, self._first
        if self._packed > self._summed:
            late = slots.behind(PACKED, first + self._summed + 1, slots.ranks)
            if late:
                return late
        if self._on_the_way or self._verdict.is_asking:
            return "other nodes"
        if self._unpacked < len(self._blocks):
            return slots.behind(
                REDUCED, first + self._unpacked + 1, self._reducers
            ) or slots.behind(UNPACKED, first + self._packed + 1 - slots.depth, slots.ranks)
        return self._verdict.late()

    def _pack(self) -> bool:
        """Copy the next block into this rank's slots, if it is ready and there is room; return whether it was."""
        slots, packed = self._slots, self._packed
        number = self._first + packed
        is_ready = self._exchange.is_ready
        if (
            packed == len(self._blocks)
            or packed - self._summed > 1
            or packed - self._unpacked > 2 + self._in_flight
            or (is_ready is not None and not is_ready(self._blocks[packed]))
            # All ranks have unpacked the block that used the slot before.
            or not slots.has_reached(UNPACKED, number + 1 - slots.depth, slots.ranks)
        ):
            return False
        if self._sources is not None and packed not in self._blank:
            mine = self._data[slots.rank][number % slots.depth]
            with self._verdict.guard(number), Operation(PACK):
                # This rank's own slice is read directly from the sources, when it is summed.
                for _, each in self._layout.slices_of_others(self._blocks[packed]):
                    each.gather(self._sources, mine[each.start : each.stop])
            if self._is_checked:
                slots.stamp(PACKED, number)
        slots.publish(PACKED, number + 1)
        self._packed += 1
        return True

    def _sum(self) -> bool:
        """Sum the local slice of the next block over the node, and begin its sum over nodes; return whether it did."""
        slots, index, number = self._slots, self._summed, self._first + self._summed
        if index == self._packed or len(self._on_the_way) >= max(1, self._in_flight):
            return False
        is_blank = index in self._blank
        is_summed = self._sources is not None and not is_blank
        if is_summed and not slots.has_reached(PACKED, number + 1, slots.ranks):
            return False
        out = self._sums.slot(index)
        is_summed = is_summed and out.size > 0
        is_across = self._layout.across and out.size > 0
        if self._on_the_way and not (is_summed or is_across):  # blocks are delivered in order
            return False
        self._summed += 1
        is_between = self._peers is not None and (is_summed or is_across)
        # A sum that is not sent to other nodes goes to memory of this rank, which stays in the nearest cache.
        total = out if is_between else slots.scratch.view(out.dtype)[: out.size]
        own = total
        if is_summed:
            own = self._sum_over_node(index, total, in_place=is_between and not is_across)
        elif is_blank:
            total[...] = 0
        if self._peers is None or not is_between:
            self._work(index, total, out)
            self._publish_delivery()
        elif is_across:
            self._on_the_way.append(
                self._sums.across_nodes(self._peers, index, total, self._work, is_summed=is_summed)
            )
        else:
            self._on_the_way.append(self._sums.over_nodes(self._peers, index, own, total))
        return True

    def _sum_over_node(self, index: int, total: Array, *, in_place: bool) -> Array:
        """Return the sum of the local slice: ``total``, or with ``in_place`` possibly the sources themselves."""
        number, ranks = self._first + index, self._slots.ranks
        with self._verdict.guard(number):
            own = self._sums.in_place(index, total.dtype) if in_place else None
            if own is not None:
                return own
            self._check_stamps(PACKED, number, ranks)
            self._sums.over_node(index, total)
            self._check_stamps(PACKED, number, ranks)
        return total

    def _deliver(self) -> bool:
        """Deliver the next sum over nodes, if it is complete; return whether it was."""
        if not self._on_the_way:
            return False
        # A test of one request advances all sums of MPI; the other sums have several steps each.
        asked = 1 if self._sums.are_by_mpi else len(self._on_the_way)
        is_there, *_ = [each.test() for each in itertools.islice(self._on_the_way, asked)]
        if not is_there:
            return False
        self._on_the_way.popleft()
        index = self._delivered
        out = self._sums.slot(index)
        if self._layout.across:
            with self._verdict.guard(self._first + index):
                self._sums.take_from_nodes(index, out)
        else:
            self._work(index, out, out)
        self._publish_delivery()
        return True

    def _work(self, index: int, total: Array, out: Array) -> None:
        """Call the exchange's ``deliver`` with the sum of a slice, unless that is empty."""
        if out.size:
            guard = self._verdict.guard(self._first + index, BaseException)
            with guard, Operation(self._caller):  # the time counts as the caller's
                self._exchange.deliver(index, total, self._sums.scale, out)

    def _publish_delivery(self) -> None:
        number = self._first + self._delivered
        self._delivered += 1
        if self._is_checked:
            self._slots.stamp(REDUCED, number)
        self._slots.publish(REDUCED, number + 1)

    def _settle(self) -> bool:
        """After the last block, find out whether any failed on other nodes; return whether anything has changed."""
        return self._delivered == len(self._blocks) and self._verdict.settle()

    def _unpack(self) -> bool:
        """Copy the other ranks' slices of the next block, if they are published; return whether they were."""
        slots, number = self._slots, self._first + self._unpacked
        reducers = self._reducers
        if self._unpacked == self._delivered or not slots.has_reached(
            REDUCED, number + 1, reducers
        ):
            return False
        targets = self._exchange.targets
        if targets is not None:
            with self._verdict.guard(None), Operation(UNPACK):
                self._check_stamps(REDUCED, number, reducers)
                for rank, each in self._layout.slices_of_others(self._blocks[self._unpacked]):
                    values = self._data[rank][number % slots.depth][each.start : each.stop]
                    each.scatter(values, targets)
                self._check_stamps(REDUCED, number, reducers)
        slots.publish(UNPACKED, number + 1)
        self._unpacked += 1
        return True

    def _check_stamps(self, stage: int, number: int, ranks: int) -> None:
        """In checked mode, raise if the slot of a rank does not have the block that is read."""
        if self._is_checked:
            for rank in range(ranks):
                self._slots.check_stamp(stage, number, rank)
