"""Chunks of work that rank 0 deals out to whichever rank has none, and whose results it gets back.

Rank 0 works as well, and looks for results of the others between two chunks of its own. So that the
others need not wait for that, each has one more chunk than the one it works on. Nothing is sent
unasked but these two, and rank 0 never waits in sending: however large chunks and results are, no two
ranks wait for each other. (``mpi4py.futures`` is not used: its master computes nothing, and it takes
its workers out of the job, or starts others.)

An error in an item is no error of the job: in the item's place stands a
:class:`~chainer_dist.errors.FailedItem`.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

from chainer_dist.collectives.agreement import check_same
from chainer_dist.collectives.failures import describe_error, raise_first, raise_together, together
from chainer_dist.collectives.messages import unpack
from chainer_dist.errors import FailedItem, FailedItemsError
from chainer_dist.parallel.items import Block, Chunk, pack_items, unpack_items

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mpi4py.util import pkl5

    from chainer_dist.collectives.failures import Failure
    from chainer_dist.communicators import CommunicatorBase

ON_ERROR = ("raise", "return")


_TAG = 17_711  # of all messages here, so that they do not meet messages of the script
_AHEAD = 2  # chunks that a rank has, with the one it works on

_dealing: weakref.WeakSet[CommunicatorBase] = weakref.WeakSet()


class End(NamedTuple):
    """How it ended, known to every rank.

    Attributes:
        failed: All items that failed, in the order of their indices.
        failure: Description of an error of the input, see
            :func:`~chainer_dist.collectives.failures.describe_error`; None if there is none.
        error: That error itself on rank 0.
    """

    failed: list[FailedItem]
    failure: Failure
    error: BaseException | None

    def raise_errors(self, comm: CommunicatorBase, results: Any, *, raises: bool) -> None:
        """Raise the input's error, or else one for the items that failed. Local; the same on all ranks.

        Args:
            comm: Communicator.
            results: Where they were collected, for the error.
            raises: Whether failed items are to raise.
        """
        if self.error is not None and comm.size == 1:
            raise self.error
        raise_first({0: self.failure}, self.error)
        if raises and self.failed:
            raise FailedItemsError(self.failed, results)


class _Task(NamedTuple):
    """A chunk on its way; what it is made of can be pickled for sure."""

    number: int
    first: int
    length: int
    packed: Any


class _Result(NamedTuple):
    """A block on its way."""

    rank: int
    number: int
    packed: Any
    failed: list[FailedItem]


def check(comm: CommunicatorBase, describe: Callable[[], list[tuple[str, str]]]) -> None:
    """Make sure that all ranks call with the same options. Collective.

    Args:
        comm: Communicator.
        describe: Raises what is wrong with this rank's arguments; returns names and descriptions of
            those that are the same on every rank.

    Raises:
        RuntimeError: If this rank deals out something on this communicator already; the others are
            waiting in that.
        RankMismatchError: On every rank, if descriptions differ.
        Exception: On every rank, what ``describe`` raised.
    """
    if comm in _dealing:
        raise RuntimeError(
            "rank 0 has not come to the end of another pmap on this communicator, in which the "
            "other ranks are: exhaust it, or close() it, before this one"
        )
    with together(comm):
        lines = describe()
    check_same(comm, lines)


def check_on_error(on_error: str) -> None:
    """Raise ValueError if it is none of the choices. Local."""
    if on_error not in ON_ERROR:
        raise ValueError(f"on_error is {on_error!r}, expected 'raise' or 'return'")


class Dealer:
    """Rank 0's side.

    More than ten attributes: options, the chunks that are in work, and counts of all.

    Args:
        comm: Communicator, whose other ranks are in :func:`serve`.
        chunks: Yields sequences of items; advanced only when a rank can begin to work on them.
        work: Makes a block of a chunk, and lets no error of an item through.
        ordered: Whether blocks come in the order of chunks, or as they are made.
        ahead: How many chunks at most are in work or wait to be taken from here.
        bar: Progress bar of tqdm, or None.
    """

    def __init__(
        self,
        comm: CommunicatorBase,
        chunks: Iterator[Sequence[Any]],
        work: Callable[[Chunk], Block],
        *,
        ordered: bool,
        ahead: int,
        bar: Any = None,
    ) -> None:
        self._comm = comm
        self._chunks = chunks
        self._work = work
        self._ordered = ordered
        self._most = ahead
        self._bar = bar
        self._own: tuple[int, Chunk] | None = None  # this rank's, with its number
        self._chunk_of: dict[int, tuple[int, int]] = {}  # first item and length, while in work
        self._in_work = [0] * comm.size  # chunks of each rank
        self._sending: list[pkl5.Request] = []
        self._finished: dict[int, Block] = {}
        self._n_chunks = self._n_items = self._n_taken = 0
        self._is_exhausted = False
        self.failed: list[FailedItem] = []
        self.error: BaseException | None = None  # of the input
        _dealing.add(comm)

    def next_block(self) -> Block | None:
        """Return a block, or None if there are no more, having worked or waited for it."""
        while True:
            self._receive_all()
            self._deal()
            number = self._n_taken if self._ordered else next(iter(self._finished), -1)
            if number in self._finished:
                self._n_taken += 1
                return self._finished.pop(number)
            if self._own is not None:
                number, chunk = self._own
                self._own = None
                self._finish(number, self._work(chunk))
            elif any(self._in_work):
                self._receive()
            else:
                return None

    def dismiss(self, failed: list[FailedItem]) -> End:
        """Let the other ranks return, once they are done with what they have.

        Args:
            failed: Failed items that they are sent.
        """
        while any(self._in_work):
            self._receive()
        for request in self._sending:
            request.wait()
        failure = describe_error(self.error)
        end = End(sorted(failed, key=lambda each: each.index), failure, None)
        for rank in range(1, self._comm.size):
            self._comm.send_obj(end, rank, _TAG)
        _dealing.discard(self._comm)
        if self._bar is not None:
            self._bar.close()
        return end._replace(error=self.error)

    def _deal(self) -> None:
        """Give a chunk to all ranks that have none, this rank too, and then one more to the others."""
        self._sending = [request for request in self._sending if not request.test()[0]]
        for enough in range(1, _AHEAD + 1):
            for rank in range(1, self._comm.size):
                if self._in_work[rank] < enough:
                    self._send(rank)
            if self._own is None:
                self._own = self._next_chunk()

    def _next_chunk(self) -> tuple[int, Chunk] | None:
        if self._is_exhausted or self._n_chunks - self._n_taken >= self._most:
            return None
        try:
            items = next(self._chunks)
        except StopIteration:
            self._is_exhausted = True
            return None
        except BaseException as error:  # noqa: BLE001 - it is raised at the end, on all ranks
            self._is_exhausted = True
            self.error = error
            return None
        number, chunk = self._n_chunks, Chunk(self._n_items, items)
        self._n_chunks += 1
        self._n_items += len(items)
        self._chunk_of[number] = chunk.first, len(items)
        return number, chunk

    def _send(self, rank: int) -> None:
        taken = self._next_chunk()
        if taken is not None:
            number, (first, items) = taken
            packed, _ = pack_items(self._comm, first, items)
            task = _Task(number, first, len(items), packed)
            self._sending.append(self._comm.isend_obj(task, rank, _TAG))
            self._in_work[rank] += 1

    def _receive_all(self) -> None:
        from mpi4py import MPI

        if self._comm.size > 1:
            while self._comm.mpi_comm.Iprobe(MPI.ANY_SOURCE, _TAG):
                self._receive()

    def _receive(self) -> None:
        from mpi4py import MPI

        result: _Result = self._comm.recv_obj(MPI.ANY_SOURCE, tag=_TAG)
        self._in_work[result.rank] -= 1
        first, length = self._chunk_of[result.number]
        values, failed = unpack_items(self._comm, first, length, result.packed)
        self._finish(result.number, Block(first, values, [*result.failed, *failed]))

    def _finish(self, number: int, block: Block) -> None:
        _, length = self._chunk_of.pop(number)
        self._finished[number] = block
        self.failed += block.failed
        if self._bar is not None:
            self._bar.update(length)


def serve(comm: CommunicatorBase, work: Callable[[Chunk], Block]) -> End:
    """Work for rank 0 until it says that this is the end. The side of the other ranks."""
    while True:
        task: _Task | End = comm.recv_obj(0, tag=_TAG)
        if isinstance(task, End):
            return task
        number, first, length, packed = task
        items, _ = unpack_items(comm, first, length, packed)
        block = work(Chunk(first, items))
        packed, unsent = pack_items(comm, first, block.values)
        comm.send_obj(_Result(comm.rank, number, packed, [*block.failed, *unsent]), 0, _TAG)


def collect(
    comm: CommunicatorBase,
    make_dealer: Callable[[], Dealer],
    work: Callable[[Chunk], Block],
    *,
    everywhere: bool,
) -> tuple[list[Sequence[Any]] | None, End]:
    """Have all work done. Collective.

    Args:
        comm: Communicator.
        make_dealer: Called on rank 0.
        work: As for :class:`Dealer`.
        everywhere: Whether every rank gets the results; otherwise rank 0. The same on every rank.

    Returns:
        What the values of all blocks are, or None where there are to be none; and how it ended.
    """
    if comm.rank > 0:
        end = serve(comm, work)
        if not everywhere:
            return None, end
        messages = comm.bcast_obj(None)
        with together(comm):
            opened = [unpack(message) for message in messages]
        return opened, end
    dealer = make_dealer()
    blocks = []
    while (block := dealer.next_block()) is not None:
        blocks.append(block)
    if not everywhere or comm.size == 1:
        return [block.values for block in blocks], dealer.dismiss(dealer.failed)
    messages, collected = [], []
    for first, values, _ in blocks:
        message, failed = pack_items(comm, first, values)  # what this rank itself has computed
        messages.append(message)
        collected.append(unpack(message) if failed else values)
        dealer.failed += failed
    end = dealer.dismiss(dealer.failed)
    comm.bcast_obj(messages)
    raise_together(comm, None)  # what others cannot unpickle
    return collected, end
