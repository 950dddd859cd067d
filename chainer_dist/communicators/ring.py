"""Blocks of arrays, passed between the ranks of a node through shared memory.

Each rank copies a block of its arrays into memory that all of them see, sums its own slice of
everybody's block, and copies the other slices of the result back. Blocks are so small that they
stay in the cache on the way, so that an array is read from memory once and written once. Blocks
follow one another without a barrier; counters in the shared memory tell how far each rank has come.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import os
import time
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from chainer_dist.communicators import _reduction
from chainer_dist.communicators.agreement import describe_error, raise_first
from chainer_dist.communicators.node_memory import barrier, share_memory
from chainer_dist.communicators.operation import EXCHANGE, WAITING, Kind, Operation, innermost

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mpi4py import MPI

    from chainer_dist.communicators.arrays import Array
    from chainer_dist.communicators.communicator_base import CommunicatorBase

BLOCK_BYTES = 1 << 20
# Three blocks are under way at a time: one being packed, one reduced, one unpacked. Many more slots
# than that are worth their memory where cores have no cache in common: a line that another core has
# read lately is written ten times more slowly there (2.9 against 38 GB/s on one virtual machine,
# whose two cores have or have not, from one minute to the next).
SLOTS = 12
_FEWEST_SLOTS = 4
_NODE_BYTES = 256 << 20  # that many slots may take on a node of many ranks

_LINE_BYTES = 64  # counters of different ranks, and kinds, are on cache lines of their own
_PACKED, _REDUCED, _UNPACKED, _FAILED = (i * _LINE_BYTES // 8 for i in range(4))
_COUNTER_BYTES = 4 * _LINE_BYTES

_SPINS = 200
_YIELDS = 2_000

_RUN = Kind("exchange in shared memory", EXCHANGE)
_WAIT = Kind("waiting for blocks", WAITING)


class Slice(NamedTuple):
    """Consecutive elements of a block: all of some arrays, or of the first and the last a part."""

    start: int  # in the block
    stop: int
    arrays: slice  # which arrays, none of them if there are no elements
    begin: int  # the first element of the first of them
    end: int  # the end in the last of them
    inside: list[slice]  # where each of them is, counted from ``start``

    def views(self, arrays: Sequence[Array]) -> list[Array]:
        """Return what of 1-dimensional arrays is in the slice."""
        views = list(arrays[self.arrays])
        if views:
            views[-1] = views[-1][: self.end]
            views[0] = views[0][self.begin :]
        return views

    def gather(self, arrays: Sequence[Array], out: Array | None) -> Array:
        """Return the slice, in ``out`` or, if it is of one array and there is no ``out``, a view."""
        views = self.views(arrays)
        if out is None:
            return views[0] if len(views) == 1 else np.concatenate(views)
        if views:
            np.concatenate(views, out=out, casting="same_kind")
        return out

    def scatter(self, values: Array, arrays: Sequence[Array]) -> None:
        """Copy the slice's values to the arrays."""
        for view, inside in zip(self.views(arrays), self.inside):
            view[...] = values[inside]


class Block(NamedTuple):
    """What is reduced in one go."""

    start: int  # of its first element, counted through all arrays
    stop: int
    slices: list[Slice]  # one a reducing rank


class Ring:
    """The shared memory of a node: for each rank a few counters and a ring of blocks.

    Creating one is collective, and so is every call of :meth:`run`.

    Attributes:
        scale: What makes the sum over all ranks a mean.
        scratch: Where the sum of a slice is while :meth:`run` has it worked on, as bytes.
        patient: Whether to sleep rather than spin while waiting, so that a thread that computes
            has the core and Python's lock.
    """

    def __init__(self, comm: CommunicatorBase) -> None:
        from mpi4py import MPI

        node = comm.node_comm
        self._comm = comm
        self._node = node
        self._number = comm.rank
        self._rank, self._ranks = node.rank, node.size
        self.scale = 1.0 / comm.size
        # Nodes may have different numbers of ranks; so many slices as the smallest has.
        self._reducers = cast("int", comm.mpi_comm.allreduce(node.size, MPI.MIN))
        self._peers: MPI.Intracomm | None = None
        if comm.inter_size > 1:
            color = self._rank if self._rank < self._reducers else MPI.UNDEFINED
            self._peers = cast("MPI.Intracomm", comm.mpi_comm.Split(color, comm.rank))
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(1)
        self._spins = _SPINS if self._ranks <= len(cores) else 0
        self._sync = barrier()
        affordable = _NODE_BYTES // (node.size * BLOCK_BYTES)
        self._depth = max(_FEWEST_SLOTS, min(SLOTS, affordable))
        shared = share_memory(comm, node.size * (self._depth * BLOCK_BYTES + _COUNTER_BYTES))
        slots, counters = np.split(shared, [node.size * self._depth * BLOCK_BYTES])
        self._slots = list(slots.reshape(node.size, -1))
        # Elements of a memoryview are read and written faster than those of an array.
        self._counters = [memoryview(each).cast("q") for each in counters.reshape(node.size, -1)]
        self.scratch = np.empty(BLOCK_BYTES, dtype=np.uint8)
        self.patient = False
        self._done = 0  # blocks in all calls so far
        self._error: Exception | None = None
        self._caller = _RUN  # what the blocks are exchanged for
        self._members = node.allgather(comm.rank)

    def cut(self, sizes: Sequence[int], dtype: np.dtype[Any]) -> list[Block]:
        """Cut arrays of so many elements, one behind the other, into blocks. Local.

        Args:
            sizes: Elements of each array.
            dtype: In which they are reduced.
        """
        return cut(tuple(sizes), BLOCK_BYTES // dtype.itemsize, self._reducers)

    def own(self, block: Block) -> Slice:
        """Return what of a block this rank reduces."""
        if self._rank < self._reducers:
            return block.slices[self._rank]
        size = block.stop - block.start
        return Slice(size, size, slice(0, 0), 0, 0, [])

    def run(
        self,
        blocks: Sequence[Block],
        dtype: np.dtype[Any],
        sources: Sequence[Array] | None,
        deliver: Callable[[int, Array, Array], None],
        targets: Sequence[Array] | None,
    ) -> None:
        """Reduce arrays, work on the own slice of each block, and share the result. Collective.

        Args:
            blocks: From :meth:`cut`.
            dtype: In which ``sources`` are summed.
            sources: 1-dimensional arrays, unchanged except where ``deliver`` or ``targets`` change
                them. None if there is nothing to sum.
            deliver: Called for each block of which this rank has a slice, with the block's number,
                the slice's sum over all ranks, added in the order of rank, and an array that takes
                what the other ranks get; both arrays are of ``dtype``. The sum is its to change.
            targets: Arrays that take the slices of the other ranks; None if nobody wants them.

        Raises:
            Exception: On every rank of the node, what ``deliver`` raised on one, after the last block.
        """
        outer = innermost()
        self._caller = _RUN if outer is None else outer.kind
        with Operation(_RUN, self._comm):
            self._run(blocks, dtype, sources, deliver, targets)

    def _run(
        self,
        blocks: Sequence[Block],
        dtype: np.dtype[Any],
        sources: Sequence[Array] | None,
        deliver: Callable[[int, Array, Array], None],
        targets: Sequence[Array] | None,
    ) -> None:
        slots = [each.view(dtype).reshape(self._depth, -1) for each in self._slots]
        # Three stages, each a block behind the one before, so that ranks seldom wait.
        for step in range(len(blocks) + 2):
            if step < len(blocks):
                self._pack(blocks[step], sources, slots, self._done + step)
            if 1 <= step <= len(blocks):
                self._reduce(blocks[step - 1], sources, slots, self._done + step - 1, deliver)
            if step > 1:
                self._unpack(blocks[step - 2], targets, slots, self._done + step - 2)
        self._done += len(blocks)
        if any(counters[_FAILED] for counters in self._counters):
            self._raise()

    def _pack(
        self, block: Block, sources: Sequence[Array] | None, slots: list[Array], number: int
    ) -> None:
        # The slot's last block is through.
        self._wait(_UNPACKED, number + 1 - self._depth, self._ranks)
        if sources is not None:
            mine = slots[self._rank][number % self._depth]
            for rank, part in enumerate(block.slices):
                if rank != self._rank:  # the own slice is read where it is, when its turn comes
                    part.gather(sources, mine[part.start : part.stop])
        self._tell(_PACKED, number + 1)

    def _reduce(
        self,
        block: Block,
        sources: Sequence[Array] | None,
        slots: list[Array],
        number: int,
        deliver: Callable[[int, Array, Array], None],
    ) -> None:
        if self._rank >= self._reducers:
            return
        own = self.own(block)
        out = slots[self._rank][number % self._depth][own.start : own.stop]
        total = self.scratch.view(out.dtype)[: out.size]  # stays in the nearest cache
        if sources is not None and out.size:
            self._wait(_PACKED, number + 1, self._ranks)
            parts = [each[number % self._depth][own.start : own.stop] for each in slots]
            parts[self._rank] = own.gather(sources, None)
            if len(parts) == 1:
                np.copyto(total, parts[0])
            else:
                np.add(parts[0], parts[1], out=total)
            for part in parts[2:]:
                total += part
            if self._peers is not None:
                _reduction.sum_in_place(self._peers, total)
        if out.size:
            try:
                with Operation(self._caller):  # whose work it is
                    deliver(number - self._done, total, out)
            except Exception as error:  # noqa: BLE001 - the others wait for the blocks to come
                self._error = self._error or error
                self._counters[self._rank][_FAILED] = 1
        self._tell(_REDUCED, number + 1)

    def _unpack(
        self, block: Block, targets: Sequence[Array] | None, slots: list[Array], number: int
    ) -> None:
        self._wait(_REDUCED, number + 1, self._reducers)
        if targets is not None:
            for rank, part in enumerate(block.slices):
                if rank != self._rank:
                    values = slots[rank][number % self._depth][part.start : part.stop]
                    part.scatter(values, targets)
        self._tell(_UNPACKED, number + 1)

    def _tell(self, counter: int, value: int) -> None:
        self._sync()  # what was written before is seen before the counter
        self._counters[self._rank][counter] = value

    def _wait(self, counter: int, value: int, ranks: int) -> None:
        """Wait until a counter of each of the first ``ranks`` ranks has come to ``value``."""
        tries = 0
        for rank, counters in enumerate(self._counters[:ranks]):
            while counters[counter] < value:
                tries += 1
                if self.patient or tries > _YIELDS:
                    self._wait_long(rank, counter, value)
                elif tries > self._spins:
                    os.sched_yield()
        self._sync()

    def _wait_long(self, rank: int, counter: int, value: int) -> None:
        """Wait for a rank of the node that is far behind, and may want this core."""
        counters = self._counters[rank]
        with Operation(_WAIT, self._comm, within=f"of rank {self._members[rank]}"):
            while counters[counter] < value:
                time.sleep(5e-5)

    def _raise(self) -> None:
        """Raise on every rank of the node what went wrong on one."""
        error, self._error = self._error, None
        failures = dict(self._node.allgather((self._number, describe_error(error))))
        self._counters[self._rank][_FAILED] = 0
        self._node.Barrier()
        raise_first(failures, error)

    def free(self) -> None:
        """Give the memory back. Collective."""
        self._counters, self._slots = [], []
        if self._peers is not None and self._rank < self._reducers:
            self._peers.Free()


@functools.lru_cache(maxsize=64)
def cut(sizes: tuple[int, ...], capacity: int, reducers: int) -> list[Block]:
    """Cut arrays, one behind the other, into blocks of ``capacity`` elements. Local.

    Args:
        sizes: Elements of each array.
        capacity: Elements of a block; the last one may have less.
        reducers: How many slices each block has.
    """
    edges = list(itertools.accumulate(sizes, initial=0))
    return [
        Block(start, stop, _share_out(edges, start, stop, reducers))
        for start in range(0, edges[-1], capacity)
        for stop in [min(start + capacity, edges[-1])]
    ]


def _share_out(edges: list[int], start: int, stop: int, reducers: int) -> list[Slice]:
    """Share elements ``[start, stop)`` of arrays, which begin at ``edges``, out to ranks."""
    slices = []
    for rank in range(reducers):
        low, high = (start + (stop - start) * i // reducers for i in (rank, rank + 1))
        if low == high:
            slices.append(Slice(low - start, low - start, slice(0, 0), 0, 0, []))
            continue
        first = bisect.bisect_right(edges, low) - 1
        last = bisect.bisect_left(edges, high)  # behind the last array
        ends = [low, *edges[first + 1 : last], high]
        inside = [slice(begin - low, end - low) for begin, end in zip(ends, ends[1:])]
        begin, end = low - edges[first], high - edges[last - 1]
        slices.append(Slice(low - start, high - start, slice(first, last), begin, end, inside))
    return slices
