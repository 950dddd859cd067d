"""The communicator whose ranks meet in shared memory.

Ranks of a node need no messages: each copies a block of its gradients into memory that all of them
see, sums its own slice of everybody's block, and copies the other slices of the mean back. Blocks
are so small that they stay in the cache on the way, so that a gradient is read from memory once
and written once. Blocks follow one another without a barrier; counters in the shared memory tell
how far each rank has come.
"""

from __future__ import annotations

import functools
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from chainer_dist.communicators import _reduction
from chainer_dist.communicators.communicator_base import CommunicatorBase

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mpi4py import MPI

    from chainer_dist.communicators.arrays import Array

BLOCK_BYTES = 1 << 20  # at most
SLOTS = 4  # blocks under way at a time: one being packed, one reduced, one unpacked, one to spare

_LINE_BYTES = 64  # counters of different ranks, and kinds, are on cache lines of their own
_PACKED, _REDUCED, _UNPACKED = (i * _LINE_BYTES // 8 for i in range(3))
_HEADER_BYTES = 4096

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where MPI allocates, on Linux
_MIN_BLOCK_BYTES = 512

_SPINS = 200
_YIELDS = 2_000


class _Piece(NamedTuple):
    """Elements ``[start, stop)`` of an array, and where in a block they are."""

    array: int
    start: int
    stop: int
    offset: int


class _Block(NamedTuple):
    """What is averaged in one go."""

    pack: list[_Piece]
    unpack: list[list[_Piece]]  # for each slice
    edges: list[int]  # where the slices of the reducing ranks begin and end


class SharedMemoryCommunicator(CommunicatorBase):
    """Averages through shared memory on each node, and slice by slice between nodes.

    Takes 4 MiB of shared memory a rank, whatever the size of the model, less where there is little
    of it, and raises MemoryError on every rank where there is almost none. The order of summation is
    that of the ranks, so the same input gives the same bits each time. Between nodes every rank
    exchanges its own slice with the ranks of the same number on the other nodes.
    """

    name = "shared_memory"

    def mean_arrays(self, arrays: Sequence[Array]) -> None:
        """See :meth:`CommunicatorBase.mean_arrays`."""
        if self.size == 1:
            return
        ring: _Ring | None = self.__dict__.get("_ring")
        if ring is None:
            ring = self._ring = _Ring(self)
        groups: dict[np.dtype[Any], list[Array]] = {}
        for array in arrays:
            if array.size:
                groups.setdefault(array.dtype, []).append(array)
        for dtype, group in groups.items():
            ring.mean(_reduction.wire_dtype(dtype), group)

    def finalize(self) -> None:
        """Give shared memory and MPI communicators back. Collective; a second call does nothing."""
        ring: _Ring | None = self.__dict__.pop("_ring", None)
        if ring is not None:
            ring.free()
        super().finalize()


class _Ring:
    """The shared memory of a node: for each rank three counters and a ring of blocks.

    Creating one is collective.
    """

    def __init__(self, comm: CommunicatorBase) -> None:
        from mpi4py import MPI

        node = comm.node_comm
        self._rank, self._ranks = node.rank, node.size
        self._scale = 1.0 / comm.size
        # Nodes may have different numbers of ranks; so many slices as the smallest has.
        self._reducers = cast("int", comm.mpi_comm.allreduce(node.size, MPI.MIN))
        self._peers: MPI.Intracomm | None = None
        if comm.inter_size > 1:
            color = self._rank if self._rank < self._reducers else MPI.UNDEFINED
            self._peers = cast("MPI.Intracomm", comm.mpi_comm.Split(color, comm.rank))
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(1)
        self._spins = _SPINS if self._ranks <= len(cores) else 0
        self._block_bytes = _fitting_block(comm)
        self._window = MPI.Win.Allocate_shared(_HEADER_BYTES + SLOTS * self._block_bytes, comm=node)
        shared = [cast("bytes", self._window.Shared_query(rank)[0]) for rank in range(node.size)]
        segments = [memoryview(each).cast("B") for each in shared]
        self._counters = [each[:_HEADER_BYTES].cast("q") for each in segments]
        self._slots = [np.frombuffer(each[_HEADER_BYTES:], dtype=np.uint8) for each in segments]
        for counter in (_PACKED, _REDUCED, _UNPACKED):
            self._counters[self._rank][counter] = 0
        self._done = 0  # blocks in all calls so far
        self._window.Lock_all(MPI.MODE_NOCHECK)
        node.Barrier()

    def mean(self, dtype: np.dtype[Any], arrays: list[Array]) -> None:
        """Average arrays of one dtype, none of them empty, in place. Collective."""
        # In C order, and a copy where that is not the layout.
        flat = [array.reshape(-1) for array in arrays]
        blocks = _plan(
            tuple(array.size for array in flat), self._block_bytes // dtype.itemsize, self._reducers
        )
        slots = [each.view(dtype).reshape(SLOTS, -1) for each in self._slots]
        # Three stages, each a block behind the one before, so that ranks seldom wait.
        for step in range(len(blocks) + 2):
            if step < len(blocks):
                self._pack(blocks[step], flat, slots, self._done + step)
            if 1 <= step <= len(blocks):
                self._reduce(blocks[step - 1], slots, self._done + step - 1)
            if step > 1:
                self._unpack(blocks[step - 2], flat, slots, self._done + step - 2)
        self._done += len(blocks)
        for array, copy in zip(arrays, flat):
            if not array.flags.c_contiguous:
                array[...] = copy.reshape(array.shape)

    def _pack(self, block: _Block, flat: list[Array], slots: list[Array], number: int) -> None:
        self._wait(_UNPACKED, number + 1 - SLOTS, self._ranks)  # the slot's last block is through
        mine = slots[self._rank][number % SLOTS]
        pieces = [flat[array][start:stop] for array, start, stop, _ in block.pack]
        np.concatenate(pieces, out=mine[: block.edges[-1]], casting="same_kind")
        self._tell(_PACKED, number + 1)

    def _reduce(self, block: _Block, slots: list[Array], number: int) -> None:
        if self._rank >= self._reducers:
            return
        self._wait(_PACKED, number + 1, self._ranks)
        own = slice(*block.edges[self._rank : self._rank + 2])
        parts = [each[number % SLOTS][own] for each in slots]
        total = np.add(parts[0], parts[1]) if len(parts) > 1 else parts[0].copy()
        for part in parts[2:]:
            total += part
        if self._peers is not None:
            _reduction.sum_in_place(self._peers, total)
        np.multiply(total, self._scale, out=parts[self._rank])
        self._tell(_REDUCED, number + 1)

    def _unpack(self, block: _Block, flat: list[Array], slots: list[Array], number: int) -> None:
        self._wait(_REDUCED, number + 1, self._reducers)
        for source, pieces in enumerate(block.unpack):
            mean = slots[source][number % SLOTS]
            for array, start, stop, offset in pieces:
                flat[array][start:stop] = mean[offset : offset + stop - start]
        self._tell(_UNPACKED, number + 1)

    def _tell(self, counter: int, value: int) -> None:
        self._window.Sync()  # what was written before is seen before the counter
        self._counters[self._rank][counter] = value

    def _wait(self, counter: int, value: int, ranks: int) -> None:
        """Wait until a counter of each of the first ``ranks`` ranks has come to ``value``."""
        tries = 0
        for counters in self._counters[:ranks]:
            while counters[counter] < value:
                tries += 1
                if tries > _YIELDS:
                    time.sleep(5e-5)  # somebody is far behind, and may want this core
                elif tries > self._spins:
                    os.sched_yield()
        self._window.Sync()

    def free(self) -> None:
        """Give the memory back. Collective."""
        self._counters, self._slots = [], []
        self._window.Unlock_all()
        self._window.Free()
        if self._peers is not None and self._rank < self._reducers:
            self._peers.Free()


def _fitting_block(comm: CommunicatorBase) -> int:
    """Return how large blocks can be, in bytes, the same on every rank. Collective.

    What MPI allocates beyond the free memory is not refused, but kills the rank that touches it.
    """
    from mpi4py import MPI

    free, block = 1 << 62, BLOCK_BYTES
    if _SHARED_MEMORY.is_dir():
        free = shutil.disk_usage(_SHARED_MEMORY).free
    while block >= _MIN_BLOCK_BYTES and 2 * _node_bytes(comm, block) > free:
        block //= 2
    block = cast("int", comm.mpi_comm.allreduce(block, MPI.MIN))
    if block < _MIN_BLOCK_BYTES:
        raise MemoryError(
            f"{_SHARED_MEMORY} on some node has too little room for the shared_memory "
            f"communicator, which takes {2 * _node_bytes(comm, BLOCK_BYTES)} bytes there at best; "
            "enlarge it (docker run --shm-size) or use the communicator 'naive'"
        )
    return block


def _node_bytes(comm: CommunicatorBase, block: int) -> int:
    return comm.intra_size * (_HEADER_BYTES + SLOTS * block)


@functools.lru_cache(maxsize=64)
def _plan(sizes: tuple[int, ...], capacity: int, reducers: int) -> list[_Block]:
    """Cut arrays, one behind the other, into blocks of ``capacity`` elements."""
    blocks: list[_Block] = []
    pack: list[_Piece] = []
    filled = 0
    for array, size in enumerate(sizes):
        start = 0
        while start < size:
            stop = min(size, start + capacity - filled)
            pack.append(_Piece(array, start, stop, filled))
            filled += stop - start
            start = stop
            if filled == capacity:
                blocks.append(_sliced(pack, filled, reducers))
                pack, filled = [], 0
    if pack:
        blocks.append(_sliced(pack, filled, reducers))
    return blocks


def _sliced(pack: list[_Piece], filled: int, reducers: int) -> _Block:
    """Share a block out to the ranks that reduce it."""
    edges = [filled * i // reducers for i in range(reducers + 1)]
    unpack: list[list[_Piece]] = []
    for low, high in zip(edges, edges[1:]):
        pieces = []
        for array, start, stop, offset in pack:
            begin, end = max(offset, low), min(offset + stop - start, high)
            if begin < end:
                shift = start - offset
                pieces.append(_Piece(array, begin + shift, end + shift, begin))
        unpack.append(pieces)
    return _Block(pack, unpack, edges)
