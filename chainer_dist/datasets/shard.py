"""Data that no rank can hold: each rank reads its own part of it, from files that all can reach.

What the ranks get has the order of the files. Shuffling iterators mix the samples of a rank; to mix
the samples of all ranks, let each rank open everything as a :class:`~chainer_dist.datasets.FilesDataset` and
iterate by :class:`~chainer_dist.iterators.DistributedIterator`.
"""

from __future__ import annotations

import heapq
import os
from typing import TYPE_CHECKING, Any

from chainer_dist._counts import checked_count
from chainer_dist.collectives.agreement import check_same
from chainer_dist.collectives.calls import check_call
from chainer_dist.collectives.failures import together
from chainer_dist.datasets.files import FilesDataset, count_samples, names_of, open_arrays
from chainer_dist.datasets.intervals import split_evenly
from chainer_dist.datasets.scatter import DataSizeError
from chainer_dist.datasets.scattered import ScatteredDataset

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chainer_dist.communicators import CommunicatorBase


def shard_array(
    path: str | os.PathLike[str], comm: CommunicatorBase, *, force_equal_length: bool = True
) -> ScatteredDataset:
    """Give each rank its interval of the rows of an array in a ``.npy`` file. Collective.

    Every rank maps the file and reads no more of it than the rows that it is asked for. (Of an
    array in Fortran order, a row lies all over the file.) For several columns::

        x, t = shard_array("x.npy", comm), shard_array("t.npy", comm)
        train = chainer.datasets.TupleDataset(x, t)

    Args:
        path: File that ``numpy.save`` wrote, with an array of shape ``(n, ...)``; the same on
            every rank.
        comm: Communicator.
        force_equal_length: Whether all parts have the same length, by giving up to ``size - 1``
            rows to two ranks; otherwise each row is on exactly one rank. As with
            :func:`~chainer_dist.scatter_dataset`, and the same on every rank.

    Returns:
        This rank's rows, each a new, writable array of shape ``(...)``. Data-loader processes can
        have it; they open the file by themselves.

    Raises:
        DataSizeError: On every rank, if the array has no rows.
        RankMismatchError: On every rank, if path, option or number of rows differ.
        OSError, ValueError, TypeError: On every rank, naming rank and file, if it is not there, is
            truncated, or is something else.
    """
    check_call("shard_array(path, comm)", comm, path)
    with together(comm):
        name = os.fspath(path)
        lines = [("path", repr(name)), ("force_equal_length", repr(bool(force_equal_length)))]
    # Before the file is opened: where paths differ, one that is missing is not the error.
    check_same(comm, lines)
    with together(comm):
        whole = FilesDataset([name], open_arrays)
    check_same(comm, [("the array", f"{len(whole)} rows")])
    if len(whole) == 0:
        raise DataSizeError(f"there is nothing to shard: the array in {name} has no rows")
    part = split_evenly(len(whole), comm.size, force_equal_length=force_equal_length)[comm.rank]
    return ScatteredDataset(whole, part.begin, part.end, n_own=part.n_own)


def shard_files(
    paths: Sequence[str | os.PathLike[str]],
    comm: CommunicatorBase,
    open_file: Callable[[str], Any] | None = None,
    *,
    force_equal_length: bool = True,
    max_open: int = 16,
) -> ScatteredDataset:
    """Give each rank some files as a whole, so that the ranks have about equally many samples.

    Collective. Each file is opened once at first, by some rank, to count its samples; the largest
    is given away first, always to the rank with the fewest samples so far (Graham's LPT rule,
    SIAM J. Appl. Math. 17, 1969). From then on only its rank opens it, when it is asked for a
    sample of it.

    For example, with files that ``numpy.savez`` wrote::

        paths = sorted(pathlib.Path("data").glob("*.npz"))
        train = chainer_dist.datasets.shard_files(paths, comm)

    Args:
        paths: The files, the same list on every rank.
        comm: Communicator.
        open_file: Called with a path; returns the samples of the file, as anything with
            ``__len__`` and ``__getitem__(int)``. It had better read nothing but what it is asked
            for. None stands for :func:`~chainer_dist.datasets.open_arrays`, for ``.npy`` and
            ``.npz``.
        force_equal_length: Whether ranks with fewer samples than others repeat some of theirs, so
            that all parts have the same length. Training wants that, as all ranks make the same
            number of steps in an epoch. Otherwise lengths differ, and a rank may have none.
            Both are right for :func:`~chainer_dist.create_multi_node_evaluator`, which counts no
            sample twice. The same on every rank.
        max_open: How many files a rank keeps open at most. An ``.npz`` file is in memory while it is
            open, and when a shuffled order goes through more of them they are loaded again and
            again.

    Returns:
        This rank's samples, file after file in the order of ``paths``. Data-loader processes can
        have it if they can have ``open_file``; they open files by themselves.

    Raises:
        DataSizeError: On every rank, if there are no samples at all, or with
            ``force_equal_length`` too few files for every rank to get some.
        RankMismatchError: On every rank, if lists of files or options differ.
        Exception: On every rank, naming rank and file, if a file cannot be opened.
    """
    check_call("shard_files(paths, comm)", comm, paths)
    open_file = open_arrays if open_file is None else open_file
    with together(comm):
        names = names_of(paths)
        max_open = checked_count("max_open", max_open, 1)
    check_same(
        comm,
        [
            ("force_equal_length", repr(bool(force_equal_length))),
            ("the number of paths", str(len(names))),
            *((f"paths[{number}]", repr(name)) for number, name in enumerate(names)),
        ],
    )

    lengths = _count_all(comm, names, open_file)
    owned = _balance(lengths, comm.size)
    totals = [sum(lengths[number] for number in numbers) for numbers in owned]
    longest = max(totals)
    if longest == 0:
        raise DataSizeError(f"there is nothing to shard: no samples in {len(names)} files")
    if force_equal_length and min(totals) == 0:
        raise DataSizeError(
            f"rank {totals.index(0)} gets none of the {len(names)} files, and has no samples to "
            f"repeat; make it {comm.size} files or more with samples, or pass "
            "force_equal_length=False"
        )
    n_own = totals[comm.rank]
    length = longest if force_equal_length else n_own
    mine = owned[comm.rank] * -(-length // max(n_own, 1))  # again and again until they suffice
    files = FilesDataset(
        [names[number] for number in mine],
        open_file,
        [lengths[number] for number in mine],
        max_open,
    )
    return ScatteredDataset(files, 0, length, n_own=n_own)


def _count_all(
    comm: CommunicatorBase, names: list[str], open_file: Callable[[str], Any]
) -> list[int]:
    """Return the length of every file, each counted by one rank. Collective."""
    with together(comm):
        counts = [count_samples(name, open_file) for name in names[comm.rank :: comm.size]]
    lengths = [0] * len(names)
    for rank, each in enumerate(comm.allgather_obj(counts)):
        lengths[rank :: comm.size] = each
    return lengths


def _balance(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Return for each rank the numbers of its files, ascending. The same on every rank."""
    loads = [(0, rank) for rank in range(size)]
    owned: list[list[int]] = [[] for _ in range(size)]
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        load, rank = loads[0]
        owned[rank].append(number)
        heapq.heapreplace(loads, (load + lengths[number], rank))
    return [sorted(numbers) for numbers in owned]
