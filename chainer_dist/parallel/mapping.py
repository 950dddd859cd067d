"""A function applied to many items on all ranks, with load balancing."""

from __future__ import annotations

import atexit
import itertools
import os
import weakref
from collections.abc import Sized
from typing import TYPE_CHECKING, Any, TypeVar

from chainer_dist import _progress
from chainer_dist._counts import checked_count
from chainer_dist.collectives.calls import check_call
from chainer_dist.errors import FailedItem
from chainer_dist.parallel import dealing
from chainer_dist.parallel.dealing import Dealer
from chainer_dist.parallel.items import Block, Chunk, attempt

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator

    from chainer_dist.communicators import CommunicatorBase

    Item = TypeVar("Item")
    Result = TypeVar("Result")

_CHUNKS_A_RANK = 32  # in work or not yet taken from rank 0

# Results that rank 0 may not have taken yet.
_streams: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()
os.register_at_fork(after_in_child=_streams.clear)


def pmap(
    function: Callable[[Item], Result],
    items: Iterable[Item] | None,
    comm: CommunicatorBase,
    *,
    chunksize: int = 1,
    ordered: bool = True,
    everywhere: bool = False,
    on_error: str = "raise",
    buffersize: int | None = None,
    progress: bool = False,
) -> Iterator[Result | FailedItem]:
    """Apply a function to each item, on all ranks. Collective.

    To be looped over, as Python's ``map``::

        for result in chainer_dist.pmap(simulate, range(1000), comm):
            print(result)  # on rank 0; elsewhere there is nothing to loop over

    In the manner of ``multiprocessing.Pool.imap``. Rank 0 deals out chunks of items to whichever
    rank has none left, and works as well, so that items may take times as uneven as they like. At
    the end a rank may have one chunk waiting behind another one. Every rank calls ``pmap`` with the
    same function; as every rank runs the script, that may be a lambda or a closure over
    anything, such as a model or an open file. Only items and results travel, of any size, pickled
    unless rank 0 computes them itself. The function may not use ``comm``.

    Rank 0 takes from ``items`` and works only while results are taken from the iterator, and
    has never more than ``buffersize`` items taken without having handed out their results: items may
    be a generator without an end. Each must be an object of its own, as in a list. The other ranks
    return when rank 0's iterator is exhausted or closed (as it is where nothing refers to it any more, and when
    rank 0 ends). Until then rank 0 must use ``comm`` for nothing else. A rank that waits for rank 0, because an item takes
    it so long, is reported as any stall is (see :mod:`chainer_dist.watch`).

    Args:
        function: Called with one item.
        items: Any iterable on rank 0; ignored elsewhere, where it may be None.
        comm: Communicator.
        chunksize: Items that travel together. More of them cost less, fewer balance better.
        ordered: Whether results come in the order of the items, or as they are made.
        everywhere: Whether every rank gets all results. They are then computed before ``pmap``
            returns, and are all in memory at once.
        on_error: What happens when the function raises for an item, or an item or its result cannot
            be pickled. All other items are computed in any case, and in the place of this one is a
            :class:`~chainer_dist.errors.FailedItem`. After the last result ``raise`` raises an error on every
            rank; ``return`` does not. (Of a chunk that cannot be unpickled, all items fail.)
        buffersize: Items at most whose results were not handed out yet; fewer than ``chunksize`` count
            as that. None stands for 32 chunks a rank. If one item takes longer than all others
            within the buffer, ranks wait for it, or with ``ordered=False`` they need not.
        progress: Whether rank 0 shows a bar, for which tqdm must be installed.

    All options but ``progress`` are the same on every rank.

    Returns:
        An iterator over the results on rank 0. Elsewhere an empty one, or with ``everywhere`` one over
        the same results.

    Raises:
        FailedItemsError: On every rank, with ``on_error="raise"``, if items failed: on rank 0 after the
            last result was taken, elsewhere from ``pmap`` itself. With ``everywhere`` it has all results.
        RankMismatchError: On every rank, if options differ.
        ValueError, TypeError: On every rank, if an option or ``items`` is of no use.
        ImportError: On every rank, if tqdm is wanted on rank 0 and not installed.
        RuntimeError: On rank 0, if it has not come to the end of another one on ``comm``.
        Exception: On every rank, what ``items`` raise, after the results up to there.
    """
    check_call("pmap(function, items, comm)", comm, function, items)
    n_ahead = 0

    def describe() -> list[tuple[str, str]]:
        nonlocal n_ahead
        size = checked_count("chunksize", chunksize, 1)
        dealing.check_on_error(on_error)
        n_ahead = _CHUNKS_A_RANK * comm.size
        if buffersize is not None:
            n_ahead = max(1, checked_count("buffersize", buffersize, 1) // size)
        if comm.rank == 0:
            iter(items)  # type: ignore[arg-type]  # raises what is wrong with it
            if progress:
                _progress.load_tqdm()
        return [
            ("chunksize", str(size)),
            ("ordered", str(bool(ordered))),
            ("everywhere", str(bool(everywhere))),
            ("on_error", on_error),
            ("buffersize", str(buffersize)),
        ]

    dealing.check(comm, describe)

    def work(chunk: Chunk) -> Block:
        return _apply(comm, function, chunk)

    def make_dealer() -> Dealer:
        assert items is not None  # noqa: S101 - for the type checker
        total = len(items) if isinstance(items, Sized) else None
        return Dealer(
            comm,
            _chunks(items, chunksize),
            work,
            ordered=ordered,
            ahead=n_ahead,
            bar=_progress.bar(total=total, unit="item") if progress else None,
        )

    raises = on_error == "raise"
    if everywhere:
        blocks, end = dealing.collect(comm, make_dealer, work, everywhere=True)
        assert blocks is not None  # noqa: S101 - for the type checker
        results = [*itertools.chain.from_iterable(blocks)]
        end.raise_errors(comm, results, raises=raises)
        return iter(results)
    if comm.rank > 0:
        dealing.serve(comm, work).raise_errors(comm, None, raises=raises)
        return iter(())
    stream = _stream(comm, make_dealer(), raises=raises)
    next(stream)  # it has begun: from now on closing it lets the other ranks return
    _streams.add(stream)
    # Once more at the end of the list, whose last function is called first: others wait for all ranks.
    atexit.unregister(_close_streams)
    atexit.register(_close_streams)
    return stream


def _close_streams() -> None:
    """Let the other ranks return from what this one has not come to the end of, as it ends."""
    for stream in [*_streams]:
        stream.close()


def _apply(comm: CommunicatorBase, function: Callable[[Any], Any], chunk: Chunk) -> Block:
    """Return the results of some items. Local."""
    values = [
        item  # which has failed on the way here
        if isinstance(item, FailedItem)
        else attempt(comm, index, function, item)
        for index, item in enumerate(chunk.items, start=chunk.first)
    ]
    return Block(chunk.first, values, [x for x in values if isinstance(x, FailedItem)])


def _stream(comm: CommunicatorBase, dealer: Dealer, *, raises: bool) -> Generator[Any, None, None]:
    """Yield None, and then all results."""
    try:
        yield None
        while (block := dealer.next_block()) is not None:
            yield from block.values
    except GeneratorExit:
        dealer.dismiss([])
        raise
    dealer.dismiss(dealer.failed).raise_errors(comm, None, raises=raises)


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield lists of some items, and raise what the items raise only after those before."""
    iterator = iter(items)
    while True:
        chunk: list[Any] = []
        try:
            chunk.extend(itertools.islice(iterator, size))
        except BaseException:
            if chunk:
                yield chunk
            raise
        if chunk:
            yield chunk
        if len(chunk) < size:
            return
