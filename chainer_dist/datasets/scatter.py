"""Giving each rank its part of a dataset."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from chainer_dist._counts import checked_count
from chainer_dist.collectives.agreement import agreed_rank
from chainer_dist.collectives.calls import check_call
from chainer_dist.collectives.failures import together
from chainer_dist.datasets.handles import check_files, refuse_handles
from chainer_dist.datasets.intervals import Part, split_evenly
from chainer_dist.datasets.node_shared import scatter_parts
from chainer_dist.datasets.scattered import ScatteredDataset
from chainer_dist.datasets.take import Selection, take

if TYPE_CHECKING:
    from collections.abc import Sized

    from chainer_dist.communicators import CommunicatorBase


class DataSizeError(RuntimeError):
    """There is no dataset to scatter, or there are no samples to shard."""


def scatter_dataset(  # noqa: PLR0917 - ChainerMN's positional parameters
    dataset: Any,
    comm: CommunicatorBase,
    root: int = 0,
    shuffle: bool = False,
    seed: int | None = None,
    max_buf_len: int = 256 * 1024 * 1024,
    *,
    force_equal_length: bool = True,
) -> ScatteredDataset:
    """Give each rank its part of the dataset that rank ``root`` has. Collective.

    Each rank is sent its own samples only, as :func:`~chainer_dist.datasets.take` cuts them out:
    nothing is loaded, so a dataset of image files stays a dataset of file names. Arrays are sent
    as they lie in memory, and the ranks of a node read one copy of them in shared memory. Each
    rank may write to its part, which no other rank sees. The same samples in the same order as
    with ChainerMN's ``scatter_dataset``.

    For example, with a dataset that only rank 0 loads::

        train = chainer_dist.scatter_dataset(train if comm.rank == 0 else None, comm, shuffle=True)
        iterator = chainer.iterators.SerialIterator(train, 100)

    Args:
        dataset: On root an array, a list, or any other dataset with ``__getitem__`` and
            ``__len__``; ignored elsewhere, where it may be None.
        comm: Communicator.
        root: Rank that has the dataset, the same on every rank. Of the options below root's count.
        shuffle: Whether to shuffle the samples before they are cut into parts.
        seed: Seed of that shuffle, for ``numpy.random.RandomState``. None takes another each time.
        max_buf_len: Accepted for ChainerMN scripts. No limit has to be set.
        force_equal_length: Whether all parts have the same length, by giving up to ``size - 1``
            samples to two ranks; training wants that, as all ranks make the same number of steps.
            Otherwise each sample is on exactly one rank. Both are right for
            :func:`~chainer_dist.create_multi_node_evaluator`, which counts no sample twice.

    Returns:
        A :class:`chainer.datasets.SubDataset` of this rank's samples. Its ``_dataset`` is the dataset
        itself where that is of an unknown class, and otherwise one of its class with this rank's
        samples. With fewer samples than
        ranks some ranks get duplicates, or without ``force_equal_length`` nothing; of an empty one
        all get nothing. A single rank gets the dataset itself in its SubDataset; nothing is copied.

    Raises:
        DataSizeError: On every rank, if root's dataset is None.
        ValueError: On every rank, if ``root`` is no rank or not the same on all ranks.
        OSError: On every rank, if a node has no room for its ranks' parts.
        TypeError: On every rank, if the dataset holds an open file of h5py, lmdb, zarr, pyarrow or
            Python, which cannot be sent; it says where, and what to use instead.
        Exception: On every rank, if the dataset cannot be pickled, or if a rank does not find the
            same file that a dataset such as :class:`~chainer_dist.datasets.HDF5Dataset` has on root.
    """
    check_call("scatter_dataset(dataset, comm)", comm, dataset)
    del max_buf_len
    root = agreed_rank(comm, root, "root")
    order, parts = None, []
    with together(comm):
        if comm.rank == root:
            if comm.size > 1 or not hasattr(dataset, "__len__"):
                refuse_handles(dataset)
            n_samples = _n_samples(dataset)
            if shuffle:
                order = np.random.RandomState(seed).permutation(n_samples)
            parts = split_evenly(n_samples, comm.size, force_equal_length=force_equal_length)
    if comm.size == 1:
        return ScatteredDataset(dataset, 0, len(dataset), order)

    def make_part(rank: int) -> tuple[Any, int]:
        return _cut(dataset, order, parts[rank]), parts[rank].n_own

    own, n_own = scatter_parts(comm, root, make_part)
    with together(comm):
        check_files(own)
    if isinstance(own, Selection):  # of a dataset that is there in full: scripts ask for it
        whole = dataset if comm.rank == root else own.dataset
        return ScatteredDataset(whole, 0, len(own), own.indices, n_own)
    return ScatteredDataset(own, 0, len(own), n_own=n_own)


def scatter_index(
    n_total_samples: int, comm: CommunicatorBase, root: int = 0, *, force_equal_length: bool = True
) -> tuple[int, int]:
    """Give each rank the interval of samples that :func:`scatter_dataset` would. Collective.

    For data that every rank can read by itself. The same as ChainerMN's ``scatter_index``.

    For example, with a list of paths that all ranks have::

        begin, end = chainer_dist.scatter_index(len(paths), comm)
        own = paths[begin:end]

    Args:
        n_total_samples: Samples in all; root's counts.
        comm: Communicator.
        root: Rank whose arguments count, the same on every rank.
        force_equal_length: See :func:`scatter_dataset`.

    Returns:
        First sample of this rank, and the one after its last.

    Raises:
        ValueError: On every rank, if root's ``n_total_samples`` is negative, or ``root`` is no
            rank or not the same on all ranks.
        TypeError: On every rank, if root's ``n_total_samples`` is not an integer.
    """
    check_call("scatter_index(n_total_samples, comm)", comm, n_total_samples)
    root = agreed_rank(comm, root, "root")
    intervals = None
    with together(comm):
        if comm.rank == root:
            n_samples = checked_count("n_total_samples", n_total_samples, 0)
            parts = split_evenly(n_samples, comm.size, force_equal_length=force_equal_length)
            intervals = [(part.begin, part.end) for part in parts]
    begin, end = comm.scatter_obj(intervals, root=root)
    return begin, end


def get_n_iterations_for_one_epoch(
    dataset: Sized, local_batch_size: int, comm: CommunicatorBase
) -> int:
    """Return rank 0's number of iterations in an epoch. Collective. Deprecated as in ChainerMN.

    Args:
        dataset: This rank's part; rank 0's counts.
        local_batch_size: Samples in a rank's batch.
        comm: Communicator.

    Returns:
        The number of batches it takes to see each of rank 0's samples, on every rank.
    """
    warnings.warn(
        "get_n_iterations_for_one_epoch is deprecated; use standard epoch triggers",
        DeprecationWarning,
        stacklevel=2,
    )
    return _n_iterations(dataset, local_batch_size, comm)


def get_epoch_trigger(
    n_epochs: int, dataset: Sized, local_batch_size: int, comm: CommunicatorBase
) -> tuple[int, str]:
    """Return a trigger for ``n_epochs`` epochs. Collective. Deprecated as in ChainerMN.

    Args:
        n_epochs: Number of epochs.
        dataset: This rank's part; rank 0's counts.
        local_batch_size: Samples in a rank's batch.
        comm: Communicator.

    Returns:
        ``(iterations, "iteration")``, the same on every rank.
    """
    warnings.warn(
        "get_epoch_trigger is deprecated; use standard epoch triggers",
        DeprecationWarning,
        stacklevel=2,
    )
    return n_epochs * _n_iterations(dataset, local_batch_size, comm), "iteration"


def _n_iterations(dataset: Sized, local_batch_size: int, comm: CommunicatorBase) -> int:
    n_iterations: int = comm.bcast_obj(-(-len(dataset) // local_batch_size))
    return n_iterations


def _n_samples(dataset: Any) -> int:
    if dataset is None:
        raise DataSizeError("there is no dataset to scatter: it is None on the root")
    return len(dataset)


def _cut(dataset: Any, order: Any, part: Part) -> Any:
    """Return the samples of one rank, as a dataset."""
    if order is None:
        indices = np.arange(part.begin, part.end, dtype=np.int64)
    else:
        indices = order[part.begin : part.end]
    own = take(dataset, indices)
    if len(own) != len(indices):
        raise ValueError(
            f"take() of {type(dataset).__qualname__} gave {len(own)} samples for "
            f"{len(indices)} indices"
        )
    return own
