"""Blocks of arrays, passed between the ranks of a node through shared memory.

Each rank copies a block of its arrays into memory that all of them see, sums its own slice of
everybody's block, and copies the other slices of the result back. Blocks are so small that they
stay in the cache on the way, so that an array is read from memory once and written once. Blocks
follow one another without a barrier; counters in the shared memory tell how far each rank has come.
"""

from __future__ import annotations

import collections
import itertools
import os
import time
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from chainer_dist.collectives import reduction
from chainer_dist.collectives.failures import describe_error, raise_first
from chainer_dist.collectives.operation import (
    EXCHANGE,
    PACK,
    UNPACK,
    WAITING,
    Kind,
    Operation,
    innermost,
)
from chainer_dist.communicators.shared_memory.between_nodes import (
    MOST_NODES,
    CodedMean,
    DirectSum,
    PartOfEach,
)
from chainer_dist.communicators.shared_memory.layout import Block, Slice, Tuning, cut
from chainer_dist.communicators.shared_memory.memory import barrier, share_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mpi4py import MPI

    from chainer_dist._typing import Array
    from chainer_dist.collectives.arrays import ArrayCommunicator
    from chainer_dist.communicators.shared_memory.between_nodes import Code

    # See Ring.run.
    Deliver = Callable[[int, Array, float, Array], None]

BLOCK_BYTES = 1 << 20
# Three blocks are under way at a time: one being packed, one reduced, one unpacked. Many more slots
# than that are worth their memory where cores have no cache in common: a line that another core has
# read lately is written ten times more slowly there (2.9 against 38 GB/s on one virtual machine,
# whose two cores have or have not, from one minute to the next).
SLOTS = 12
_FEWEST_SLOTS = 4
_NODE_BYTES = 256 << 20  # that many slots may take on a node of many ranks
_MOST_IN_FLIGHT = 8
_DIRECT_IN_FLIGHT = 4
_FEWEST_BLOCKS = 32
_SMALL_BLOCK_BYTES = 256 << 10

_LINE_BYTES = 64  # counters of different ranks, and kinds, are on cache lines of their own
_PACKED, _REDUCED, _UNPACKED, _FAILED = (i * _LINE_BYTES // 8 for i in range(4))
_COUNTER_BYTES = 4 * _LINE_BYTES

_SPINS = 10
_YIELDS = 1_000

_RUN = Kind("exchange in shared memory", EXCHANGE)
_WAIT = Kind("waiting for blocks", WAITING)


def n_slots(ranks: int) -> int:
    """Return how many blocks of its own a rank can have under way, on a node of so many. Local."""
    return max(_FEWEST_SLOTS, min(SLOTS, _NODE_BYTES // (ranks * BLOCK_BYTES)))


def sums_in_flight(ranks: int) -> int:
    """Return how many sums between nodes are under way at a time, unless tuned. Local.

    So many keep the links busy while ranks pack and unpack other blocks.

    Args:
        ranks: Of a node.
    """
    return max(1, min(_MOST_IN_FLIGHT, n_slots(ranks) - _FEWEST_SLOTS))


class Ring:
    """The shared memory of a node: for each rank a few counters and a ring of blocks.

    Creating one is collective, and so is every call of :meth:`run`.

    Attributes:
        scratch: Where the sum of a slice is while :meth:`run` has it worked on, as bytes.
        tuning: How large blocks are, and how many are under way at a time; the same on every rank. Of
            runs that are advanced seldom, as many are as there is room for.
        untuned: How it is unless somebody changes ``tuning``; small models are then cut into smaller blocks.
        most: What there is room for.
        patient: Whether to sleep rather than spin while waiting, so that a thread that computes
            has the core and Python's lock.
    """

    def __init__(self, comm: ArrayCommunicator) -> None:
        from mpi4py import MPI

        node = comm.node_comm
        self._comm = comm
        self._node = node
        self._number = comm.rank
        self._rank, self._ranks = node.rank, node.size
        self._node_number, self._nodes = comm.inter_rank, comm.inter_size
        # Each rank on a node of its own: what is of one array is exchanged from where it is.
        self._is_alone = comm.size == comm.inter_size
        self._scale = 1.0 / comm.size  # what makes the sum over all ranks a mean
        # Nodes may have different numbers of ranks; so many slices as the smallest has.
        self._reducers = cast("int", comm.mpi_comm.allreduce(node.size, MPI.MIN))
        self._peers: MPI.Intracomm | None = None
        if comm.inter_size > 1:
            color = self._rank if self._rank < self._reducers else MPI.UNDEFINED
            self._peers = cast("MPI.Intracomm", comm.mpi_comm.Split(color, comm.inter_rank))
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(1)
        self._spins = _SPINS if self._ranks <= len(cores) else 0
        self._sync = barrier()
        self._current: Run | None = None
        self._depth = n_slots(node.size)
        in_flight = sums_in_flight(node.size) if comm.inter_size > 1 else 0
        self.most = Tuning(BLOCK_BYTES, in_flight)
        # More messages only wait for one another, where those of a block are all under way at once.
        few = min(in_flight, _DIRECT_IN_FLIGHT) if comm.inter_size <= MOST_NODES else in_flight
        self.tuning = self.untuned = Tuning(BLOCK_BYTES, few)
        shared = share_memory(comm, node.size * (self._depth * BLOCK_BYTES + _COUNTER_BYTES))
        slots, counters = np.split(shared, [node.size * self._depth * BLOCK_BYTES])
        self._slots = list(slots.reshape(node.size, -1))
        # Elements of a memoryview are read and written faster than those of an array.
        self._counters = [each.data.cast("q") for each in counters.reshape(node.size, -1)]
        self.scratch = np.empty(BLOCK_BYTES, dtype=np.uint8)
        self.patient = False
        self._done = 0  # blocks in all calls so far
        self._error: BaseException | None = None
        self._members = node.allgather(comm.rank)

    def cut(
        self,
        sizes: Sequence[int],
        dtype: np.dtype[Any],
        *,
        seldom: bool = False,
        across: bool = False,
    ) -> list[Block]:
        """Cut arrays of so many elements, one behind the other, into blocks. Local.

        Args:
            sizes: Elements of each array.
            dtype: In which they are reduced.
            seldom: Whether runs are advanced seldom: then as much as possible is to be under way.
            across: Whether each rank of the communicator has a slice of its own, rather than each
                rank of a node. The ranks of equal number on the nodes have consecutive ones.
        """
        nbytes = self.tuning.block_bytes
        if self.tuning == self.untuned and self.untuned.in_flight:
            # Of a small model, too, several blocks are on their way at a time.
            fewest = _SMALL_BLOCK_BYTES * (2 if seldom else 1)
            nbytes = min(nbytes, max(fewest, sum(sizes) * dtype.itemsize // _FEWEST_BLOCKS))
        slices = self._reducers * (self._nodes if across else 1)
        return cut(tuple(sizes), nbytes // dtype.itemsize, slices, whole=self._is_alone)

    def own(self, block: Block) -> Slice:
        """Return what of a block this rank reduces."""
        own = self.of_rank(block, self._rank)
        return own[self._node_number if len(own) > 1 else 0]

    def of_rank(self, block: Block, rank: int) -> list[Slice]:
        """Return what of a block a rank of this node sums up over the node, in parts for each node.

        One part is for all of them if the block was not cut across nodes.
        """
        if rank < self._reducers:
            parts = len(block.slices) // self._reducers
            return block.slices[rank * parts : (rank + 1) * parts]
        size = block.stop - block.start
        return [Slice(size, size, slice(0, 0), 0, 0, [])]

    def run(
        self,
        blocks: Sequence[Block],
        dtype: np.dtype[Any],
        sources: Sequence[Array | None] | None,
        deliver: Deliver,
        targets: Sequence[Array] | None,
        *,
        code: Code | None = None,
        absent: frozenset[int] = frozenset(),
        from_nodes: Sequence[Array] | None = None,
    ) -> None:
        """Reduce arrays, work on the own slice of each block, and share the result. Collective.

        Args:
            blocks: From :meth:`cut`.
            dtype: In which ``sources`` are summed.
            sources: 1-dimensional arrays, unchanged except where ``deliver`` or ``targets`` change
                them. None if there is nothing to sum.
            deliver: Called for each block of which this rank has a slice, with the block's number,
                the slice's sum over all ranks, what makes a mean of that, and an array that takes
                what the other ranks get; both arrays are of ``dtype``, and may be one. The sum is
                its to change. On a node it is added in the order of rank; between up to eight nodes
                in theirs, between more as MPI does.
            targets: Arrays that take the slices of the other ranks; None if nobody wants them.
            code: How numbers are sent between nodes, the same on every rank; None as they are. What
                is handed over with one is the mean already. Only for float32 and float64.
            absent: The numbers of arrays, the same on every rank, that are zero on all of them, or
                whose sum nobody wants. A block of nothing else is not exchanged: it counts as zero.
            from_nodes: With blocks cut across nodes, arrays that take what the ranks of equal number
                on the other nodes deliver, also when ``targets`` is None. None, on every rank, if
                nobody wants that. ``deliver`` is then called in any order.

        Raises:
            Exception: On every rank of the node, what ``deliver`` raised on one, after the last block.
            RuntimeError: If an earlier run has not come to its end.
        """
        self.begin(
            blocks,
            dtype,
            sources,
            deliver,
            targets,
            code=code,
            absent=absent,
            from_nodes=from_nodes,
        ).finish()

    def begin(
        self,
        blocks: Sequence[Block],
        dtype: np.dtype[Any],
        sources: Sequence[Array | None] | None,
        deliver: Deliver,
        targets: Sequence[Array] | None,
        *,
        code: Code | None = None,
        absent: frozenset[int] = frozenset(),
        from_nodes: Sequence[Array] | None = None,
        is_ready: Callable[[Block], bool] | None = None,
    ) -> Run:
        """Begin what :meth:`run` does, with arrays that come later. Local.

        All ranks of the communicator must begin it, and finish it before anything else is done with
        this ring.

        Args:
            blocks: See :meth:`run`.
            dtype: See :meth:`run`.
            sources: See :meth:`run`; entries may be set until their blocks are ready.
            deliver: See :meth:`run`.
            targets: See :meth:`run`.
            code: See :meth:`run`.
            absent: See :meth:`run`.
            from_nodes: See :meth:`run`.
            is_ready: Tells whether the sources of a block are there; once so, always so.

        Returns:
            The run, to be advanced at times, and finished.
        """
        if self._current is not None:
            raise RuntimeError(
                "an exchange of this communicator has not come to its end: either this is called "
                "while gradients are exchanged during backward, or an error ended an exchange on "
                "this rank; after an error create a new communicator"
            )
        self._current = Run(
            self,
            blocks,
            dtype,
            sources,
            deliver,
            targets=targets,
            code=code,
            absent=absent,
            from_nodes=from_nodes,
            is_ready=is_ready,
        )
        return self._current

    def mean_to(self, blocks: Sequence[Block], arrays: Sequence[Array]) -> Deliver:
        """Return what delivers the mean of the own slices to arrays, and to the other ranks. Local.

        Args:
            blocks: Of the run.
            arrays: 1-dimensional, of the sizes that were cut.
        """

        def deliver(number: int, total: Array, scale: float, out: Array) -> None:
            own = self.own(blocks[number])
            if self._ranks == 1:  # nobody else takes it from where it is
                for view, inside in zip(own.views(arrays), own.inside):
                    np.multiply(total[inside], scale, out=view, casting="same_kind")
                return
            np.multiply(total, scale, out=out)
            own.scatter(out, arrays)

        return deliver

    def _reached(self, counter: int, value: int, ranks: int) -> bool:
        """Tell whether a counter of each of the first ``ranks`` ranks has come to ``value``."""
        for counters in self._counters[:ranks]:
            if counters[counter] < value:
                return False
        self._sync()
        return True

    def _tell(self, counter: int, value: int) -> None:
        self._sync()  # what was written before is seen before the counter
        self._counters[self._rank][counter] = value

    def _behind(self, counter: int, value: int, ranks: int) -> str:
        """Name the ranks of which a counter has not come to ``value``."""
        late = [self._members[i] for i in range(ranks) if self._counters[i][counter] < value]
        return f"rank {', '.join(map(str, late))}" if late else ""

    def _end(self, blocks: int) -> None:
        """Count the blocks of a run, and raise what went wrong in it."""
        self._done += blocks
        self._current = None
        if any(counters[_FAILED] for counters in self._counters):
            self._raise()

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


class Run:
    """Blocks on their way through a ring; made by :meth:`Ring.begin`.

    Four stages follow one another, each a block or more behind the one before, so that ranks seldom
    wait. The sums between nodes are nonblocking: several are under way at a time.
    """

    def __init__(
        self,
        ring: Ring,
        blocks: Sequence[Block],
        dtype: np.dtype[Any],
        sources: Sequence[Array | None] | None,
        deliver: Deliver,
        *,
        targets: Sequence[Array] | None,
        code: Code | None,
        absent: frozenset[int],
        from_nodes: Sequence[Array] | None,
        is_ready: Callable[[Block], bool] | None,
    ) -> None:
        self._ring = ring
        self._blocks = blocks
        self._sources = cast("Sequence[Array] | None", sources)  # when they are looked at
        self._deliver_one = deliver
        self._targets = targets
        self._from_nodes = from_nodes
        self._across = bool(blocks) and len(blocks[0].slices) > ring._reducers
        self._code = code if ring._peers is not None else None
        self._scale = ring._scale if self._code is None else 1.0
        self._by_mpi = not self._across and self._code is None and ring._nodes > MOST_NODES
        self._is_ready = is_ready
        self._in_flight = (ring.tuning if is_ready is None else ring.most).in_flight
        # Of these blocks there is nothing to sum.
        self._blank = {
            number
            for number, block in enumerate(blocks)
            if absent and sources is not None and absent.issuperset(block.arrays)
        }
        self._slots = [each.view(dtype).reshape(ring._depth, -1) for each in ring._slots]
        self._first = ring._done  # the number of the first block
        self._packed = self._summed = self._delivered = self._unpacked = 0  # blocks
        # Sums between nodes, by what goes on with them and tells whether they are there.
        self._sums: collections.deque[Callable[[], bool]] = collections.deque()
        outer = innermost()
        self._caller = _RUN if outer is None else outer.kind

    def advance(self) -> bool:
        """Do what can be done without waiting; return whether that was anything. Local."""
        moved = False
        while True:
            while self._pack():
                moved = True
            if not (self._sum() | self._deliver() | self._unpack()):
                return moved
            moved = True

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to advance."""
        return self._unpacked == len(self._blocks)

    def finish(self) -> None:
        """Do the rest. Collective.

        Raises:
            Exception: See :meth:`Ring.run`.
        """
        ring = self._ring
        with Operation(_RUN, ring._comm):
            tries = 0
            while not self.is_done:
                if self.advance():
                    tries = 0
                    continue
                tries += 1
                if ring.patient or tries > _YIELDS:
                    self._wait_long()
                elif tries > ring._spins:
                    os.sched_yield()
            self.end()

    def end(self) -> None:
        """Let the ring go when all is done. Collective on the node if something went wrong.

        Raises:
            Exception: See :meth:`Ring.run`.
        """
        self._ring._end(len(self._blocks))

    def _wait_long(self) -> None:
        """Wait for ranks that are far behind, and may want this core."""
        with Operation(_WAIT, self._ring._comm, within=f"of {self._awaited()}"):
            while not self.advance():
                time.sleep(5e-5)

    def _awaited(self) -> str:
        """Say for whom this rank waits."""
        ring, number = self._ring, self._first
        late = self._packed > self._summed and ring._behind(
            _PACKED, number + self._summed + 1, ring._ranks
        )
        if late or not self._sums:
            return (
                late
                or ring._behind(_REDUCED, number + self._unpacked + 1, ring._reducers)
                or ring._behind(_UNPACKED, number + self._packed + 1 - ring._depth, ring._ranks)
            )
        return "other nodes"

    def _pack(self) -> bool:
        """Copy the next block to where the other ranks of the node see it, if it is time."""
        ring, packed = self._ring, self._packed
        number = self._first + packed
        if (
            packed == len(self._blocks)
            or packed - self._summed > 1
            or packed - self._unpacked > 2 + self._in_flight
            or (self._is_ready is not None and not self._is_ready(self._blocks[packed]))
            # The slot's last block is through.
            or not ring._reached(_UNPACKED, number + 1 - ring._depth, ring._ranks)
        ):
            return False
        if self._sources is not None and packed not in self._blank:
            mine = self._slots[ring._rank][number % ring._depth]
            with Operation(PACK):
                # The own slice is read where it is, when its turn comes.
                for _, part in self._of_others(self._blocks[packed]):
                    part.gather(self._sources, mine[part.start : part.stop])
        ring._tell(_PACKED, number + 1)
        self._packed += 1
        return True

    def _of_others(self, block: Block) -> list[tuple[int, Slice]]:
        """Return the slices that other ranks of the node reduce, and by which of them."""
        ring = self._ring
        parts = len(block.slices) // ring._reducers
        ranks = [number // parts for number in range(len(block.slices))]
        return [each for each in zip(ranks, block.slices) if each[0] != ring._rank]

    def _sum(self) -> bool:
        """Sum the own slice of the next block over the node, and begin to do so over the nodes."""
        ring, number = self._ring, self._first + self._summed
        if self._summed == self._packed or len(self._sums) >= max(1, self._in_flight):
            return False
        out = self._own(self._summed)
        is_blank = self._summed in self._blank
        is_summed = self._sources is not None and out.size > 0 and not is_blank
        if is_summed and not ring._reached(_PACKED, number + 1, ring._ranks):
            return False
        if self._across and out.size:
            self._sums.append(self._begin_part(out, sums=is_summed))
            self._summed += 1
            return True
        if self._sums and not is_summed:  # blocks are handed over in their order
            return False
        self._summed += 1
        if is_summed and ring._peers is not None:
            self._sums.append(self._begin_sum(ring._peers, number, out))
            return True
        total = ring.scratch.view(out.dtype)[: out.size]  # stays in the nearest cache
        if is_summed:
            self._sum_over_node(number, total)
        elif is_blank:
            total[...] = 0
        self._hand_over(total, out)
        return True

    def _begin_sum(self, peers: MPI.Intracomm, number: int, total: Array) -> Callable[[], bool]:
        """Sum the own slice of a block up over the node, and begin to do so over the nodes."""
        own = self._where_it_is(number, total.dtype)
        if own is None:
            self._sum_over_node(number, total)
            own = total
        if self._by_mpi:
            return reduction.begin_sum(peers, total).Test
        tag = self._tag(number)
        if self._code is None:
            return DirectSum(peers, own, total, tag=tag).test
        return CodedMean(peers, total, scale=self._ring._scale, code=self._code, tag=tag).test

    def _where_it_is(self, number: int, dtype: np.dtype[Any]) -> Array | None:
        """Return the own slice of a block if it is of one array, and no other rank of the node adds to it.

        Only a direct sum can take it from there. Not during backward: a function that changes a gradient
        in place might do so between sending and adding, and ranks would come to different sums.
        """
        is_direct = self._code is None and not self._by_mpi
        if not is_direct or self._ring._ranks > 1 or self._is_ready is not None:
            return None
        assert self._sources is not None  # noqa: S101 - for the type checker
        views = self._ring.own(self._blocks[number - self._first]).views(self._sources)
        is_usable = len(views) == 1 and views[0].dtype == dtype and views[0].flags.c_contiguous
        return views[0] if is_usable else None

    def _begin_part(self, total: Array, *, sums: bool) -> Callable[[], bool]:
        """Sum the own slice of the next block up, and begin to do so over the nodes.

        Of which each gets a part. It is zero if there is nothing to sum.
        """
        ring, index = self._ring, self._summed
        assert ring._peers is not None  # noqa: S101 - for the type checker
        if sums:
            self._sum_over_node(self._first + index, total)
        elif index in self._blank:
            total[...] = 0
        slices = ring.of_rank(self._blocks[index], ring._rank)
        start = slices[0].start
        parts = [slice(each.start - start, each.stop - start) for each in slices]
        own = total[parts[ring._node_number]]
        return PartOfEach(
            ring._peers,
            total,
            parts,
            lambda: self._work(index, own, own),
            sums=sums,
            returns=self._from_nodes is not None,
            scale=ring._scale,
            code=self._code,
            tag=self._tag(self._first + index),
        ).test

    def _tag(self, number: int) -> int:
        return 2 * (number % self._ring._depth)

    def _sum_over_node(self, number: int, total: Array) -> None:
        assert self._sources is not None  # noqa: S101 - for the type checker
        ring = self._ring
        slices = ring.of_rank(self._blocks[number - self._first], ring._rank)
        start = slices[0].start
        for own in slices:
            out = total[own.start - start : own.stop - start]
            if ring._ranks == 1:
                own.gather(self._sources, out)
            elif out.size:
                parts = [each[number % ring._depth][own.start : own.stop] for each in self._slots]
                parts[ring._rank] = own.gather(self._sources, None)
                np.add(parts[0], parts[1], out=out)
                for part in parts[2:]:
                    out += part

    def _own(self, index: int) -> Array:
        """Return where the own slice of a block goes."""
        ring = self._ring
        own = ring.of_rank(self._blocks[index], ring._rank)
        slot: Array = self._slots[ring._rank][(self._first + index) % ring._depth]
        return slot[own[0].start : own[-1].stop]

    def _deliver(self) -> bool:
        """Hand the next sum over the nodes over, if it is there."""
        if not self._sums:
            return False
        # MPI goes on with all of its own when it is asked for one; the others have several steps.
        asked = 1 if self._by_mpi else len(self._sums)
        is_there, *_ = [go_on() for go_on in itertools.islice(self._sums, asked)]
        if not is_there:
            return False
        self._sums.popleft()
        out = self._own(self._delivered)
        if self._across:
            self._take_from_nodes(out)
            self._tell_of_delivery()
        else:
            self._hand_over(out, out)
        return True

    def _take_from_nodes(self, out: Array) -> None:
        """Copy what the other nodes have made of their parts of the own slice."""
        ring = self._ring
        if self._from_nodes is not None:
            slices = ring.of_rank(self._blocks[self._delivered], ring._rank)
            for node, part in enumerate(slices):
                if node != ring._node_number:
                    start = part.start - slices[0].start
                    part.scatter(out[start : start + part.stop - part.start], self._from_nodes)

    def _hand_over(self, total: Array, out: Array) -> None:
        self._work(self._delivered, total, out)
        self._tell_of_delivery()

    def _work(self, index: int, total: Array, out: Array) -> None:
        """Hand over what there is of a block."""
        ring = self._ring
        if not out.size:
            return
        try:
            with Operation(self._caller):  # whose work it is
                self._deliver_one(index, total, self._scale, out)
        except BaseException as error:  # noqa: BLE001 - the others wait for the blocks to come
            ring._error = ring._error or error
            ring._counters[ring._rank][_FAILED] = 1

    def _tell_of_delivery(self) -> None:
        ring = self._ring
        self._delivered += 1
        ring._tell(_REDUCED, self._first + self._delivered)

    def _unpack(self) -> bool:
        """Copy the others' slices of the next block, if they are there."""
        ring, number = self._ring, self._first + self._unpacked
        if self._unpacked == self._delivered or not ring._reached(
            _REDUCED, number + 1, ring._reducers
        ):
            return False
        if self._targets is not None:
            with Operation(UNPACK):
                for rank, part in self._of_others(self._blocks[self._unpacked]):
                    values = self._slots[rank][number % ring._depth][part.start : part.stop]
                    part.scatter(values, self._targets)
        ring._tell(_UNPACKED, number + 1)
        self._unpacked += 1
        return True
