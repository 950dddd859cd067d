"""One shuffled order of a dataset for all ranks, which a resume on more or fewer ranks goes on with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from chainer import iterators
from chainer.dataset import Iterator

from chainer_dist._counts import checked_count
from chainer_dist.collectives.agreement import check_same
from chainer_dist.collectives.calls import check_call
from chainer_dist.collectives.failures import together
from chainer_dist.datasets.batches import read_batch, reads_batches
from chainer_dist.datasets.handles import check_workers

if TYPE_CHECKING:
    from collections.abc import Callable

    from chainer_dist.communicators import CommunicatorBase

    Indices = np.ndarray[Any, np.dtype[np.int64]]

_SEEDS = 1 << 32


class DistributedIterator(Iterator):  # type: ignore[misc]  # Chainer has no types
    """Iterates over one dataset on all ranks together, each sample once an epoch.

    For training on data that every rank can read: files, a mapped array, something generated.
    In each epoch all samples are shuffled anew, over all ranks, and every batch is a part of that
    order, of ``batch_size`` samples on each of the ranks: ``size * batch_size`` in all. The batches
    of all ranks in the order of rank are those that one process has with a batch of that size. As in
    Chainer's iterators the batch that completes an epoch is filled up from the next one, so that
    all batches are full, on all ranks, and epochs end in the same step everywhere. It repeats for
    ever; evaluate on parts that :func:`~chainer_dist.datasets.shard_array` or
    :func:`~chainer_dist.scatter_index` give.

    Epoch and position count samples of all ranks. A snapshot that any single rank took goes on, on
    any number of ranks and with any batch size, with exactly the samples of the epoch that were
    not seen yet, in the same order. Load it on every rank.

    The samples are loaded by one of Chainer's iterators, which may prefetch them::

        DistributedIterator(
            chainer_dist.datasets.FilesDataset(paths), 32, comm,
            make_iterator=functools.partial(MultiprocessIterator, n_processes=4))

    Creating it is collective; all else is local and must be done by every rank alike. At the
    beginning of about every epoch each rank computes the order of the whole dataset, 8 bytes a sample
    for a moment, and keeps its own indices.

    More than ten attributes: options, and the position.

    Args:
        dataset: Dataset with ``__len__`` and ``__getitem__(int)``, which has the same samples in the same
            order on every rank. Where it has a true attribute ``reads_batches``, a SerialIterator's whole batch is
            ``dataset[indices]``, of a list of ints, and must be a list of samples. The classes of
            :mod:`chainer_dist.datasets` for files of other formats have it. Chainer's Transform-, Sub-, Concatenated-,
            Tuple- and DictDataset have their samples read so from such datasets within; functions and other
            datasets are called once for each sample, in order.
        batch_size: Number of samples in a batch of one rank, the same on every rank. Can be set later, as
            ``iterator.batch_size``, for the batches from then on.
        comm: Communicator.
        shuffle: Whether to shuffle; otherwise every epoch has the order of the dataset. The same
            on every rank.
        seed: Integer from 0 to 2**32 - 1, the same on every rank. It determines, with the number of the
            epoch, the order of an epoch, on any number of ranks. None draws one from
            ``numpy.random`` on every rank, of which rank 0's counts.
        make_iterator: Called with ``dataset``, ``batch_size`` and ``order_sampler=``; returns a
            Chainer iterator that goes by that sampler: Serial-, Multithread- or
            MultiprocessIterator. It is called for the first batch, and again after ``reset()``,
            loading and ``finalize()``. If worker processes are to be spawned and the dataset holds
            an open file, the first batch is a TypeError; if they are forked, a RuntimeWarning.

    Raises:
        ValueError: On every rank, if the dataset is empty, or a number is out of range.
        TypeError: On every rank, if a number is no integer.
        RankMismatchError: On every rank, if the length of the dataset or an option differ.
    """

    repeat = True  # Chainer's Evaluator looks at it
    _loader: Iterator | None = None

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        comm: CommunicatorBase,
        *,
        shuffle: bool = True,
        seed: int | None = None,
        make_iterator: Callable[..., Iterator] = iterators.SerialIterator,
    ) -> None:
        check_call("DistributedIterator(dataset, batch_size, comm)", comm, dataset, batch_size)
        with together(comm):
            self._n_samples = checked_count("the length of the dataset", len(dataset), 1)
            batch_size = checked_count("batch_size", batch_size, 1)
            if seed is not None:
                seed = checked_count("seed", seed, 0, _SEEDS)
            lines = [
                ("the length of the dataset", str(self._n_samples)),
                ("batch_size", str(batch_size)),
                ("shuffle", str(bool(shuffle))),
                ("seed", str(seed)),
            ]
        check_same(comm, lines)
        if seed is None:
            drawn = np.random.randint(_SEEDS, dtype=np.int64)  # noqa: NPY002 - as Chainer draws
            seed = comm.bcast_obj(int(drawn))

        self._seed: int = seed
        self._dataset = dataset
        self._batch_size = batch_size
        self._shuffle = bool(shuffle)
        self.make_iterator = make_iterator
        self._rank, self._size = comm.rank, comm.size
        self.reset()

    @property
    def dataset(self) -> Any:
        """The dataset; another one of equal length can be set, on every rank, for the batches from then on."""
        return self._dataset

    @dataset.setter
    def dataset(self, dataset: Any) -> None:
        if len(dataset) != self._n_samples:
            raise ValueError(
                f"the dataset has {len(dataset)} samples, and the one of this iterator has {self._n_samples}: "
                "make another iterator"
            )
        self._dataset = dataset
        self.finalize()  # it has prefetched samples of the other one

    @property
    def batch_size(self) -> int:
        """Number of samples in a batch of one rank; can be set, on every rank."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, batch_size: int) -> None:
        self._batch_size = checked_count("batch_size", batch_size, 1)
        self.finalize()  # it has prefetched batches of the old size

    @property
    def epoch(self) -> int:
        """How many times all samples were seen."""
        return self._position // self._n_samples

    @property
    def current_position(self) -> int:
        """How many samples of this epoch all ranks together have seen."""
        return self._position % self._n_samples

    @property
    def epoch_detail(self) -> float:
        """Epochs, and the part of the present one, that all ranks together have seen."""
        return self._position / self._n_samples

    @property
    def previous_epoch_detail(self) -> float | None:
        """What :attr:`epoch_detail` was before the last batch, None before the first."""
        return None if self._previous_epoch_detail < 0 else self._previous_epoch_detail

    @property
    def is_new_epoch(self) -> bool:
        """Whether the last batch completed an epoch."""
        return self._is_new_epoch

    @property
    def seed(self) -> int:
        """The seed of all orders."""
        return self._seed

    def __next__(self) -> list[Any]:
        if self._loader is None:
            order = _OwnOrder(
                self._n_samples,
                self.batch_size,
                self._rank,
                self._size,
                seed=self._seed if self._shuffle else None,
                position=self._position,
            )
            is_serial = self.make_iterator is iterators.SerialIterator
            self._reads_batches = is_serial and reads_batches(self.dataset)
            samples = range(self._n_samples) if self._reads_batches else self.dataset
            self._loader = self.make_iterator(samples, self.batch_size, order_sampler=order)
            check_workers(self._loader)
        try:
            batch: list[Any] = next(self._loader)
            if self._reads_batches:  # the loader has yielded indices
                batch = read_batch(self.dataset, batch)
        except BaseException:
            self.finalize()  # it has gone on, and this iterator has not
            raise
        epoch, self._previous_epoch_detail = self.epoch, self.epoch_detail
        self._position += self._size * self.batch_size
        self._is_new_epoch = self.epoch > epoch
        return batch

    def reset(self) -> None:
        """Go back to the beginning of the first epoch, with the same seed. Local."""
        self.finalize()
        self._position = 0
        self._is_new_epoch = False
        self._previous_epoch_detail = -1.0

    def finalize(self) -> None:
        """End what prefetches samples. Local. The iterator can be used further."""
        if self._loader is not None:
            self._loader.finalize()
            self._loader = None

    def serialize(self, serializer: Any) -> None:
        """Save position and seed, or go on from those saved. Local; load it on every rank.

        Raises:
            ValueError: If what is loaded belongs to a dataset of another length.
        """
        n_samples = serializer("n_samples", self._n_samples)
        if n_samples != self._n_samples:
            raise ValueError(
                f"the iterator was saved with a dataset of {n_samples} samples, and this one has "
                f"{self._n_samples}: its position means nothing here"
            )
        epoch = serializer("epoch", self.epoch)
        position = epoch * n_samples + serializer("current_position", self.current_position)
        seed = serializer("seed", self._seed)
        if (position, seed) != (self._position, self._seed):
            self.finalize()  # it has prefetched something else
        self._position, self._seed = position, seed
        self._is_new_epoch = serializer("is_new_epoch", self._is_new_epoch)
        self._previous_epoch_detail = serializer(
            "previous_epoch_detail", self._previous_epoch_detail
        )


class _OwnOrder:
    """An order sampler: the indices of one rank, about as many at a time as it has in an epoch.

    Args:
        n_samples: Length of the dataset.
        batch_size: Number of samples in a batch of one rank.
        rank: Number of this rank.
        size: Number of ranks.
        seed: Seed of the orders of all epochs; None for the order of the dataset.
        position: Number of samples that all ranks together have taken before.
    """

    def __init__(
        self,
        n_samples: int,
        batch_size: int,
        rank: int,
        size: int,
        *,
        seed: int | None,
        position: int,
    ) -> None:
        self._n_samples = n_samples
        self._seed = seed
        self._batch = np.arange(batch_size) + rank * batch_size
        self._step = size * batch_size
        self._n_batches = max(1, n_samples // self._step)
        self._position = position

    def __call__(self, current_order: Indices, current_position: int) -> Indices:
        del current_order, current_position  # Chainer's, which mean nothing here
        starts = self._position + self._step * np.arange(self._n_batches)
        self._position += self._step * self._n_batches
        epochs, order = np.divmod((starts[:, None] + self._batch).ravel(), self._n_samples)
        if self._seed is not None:
            for epoch in np.unique(epochs):
                # What a RandomState of a seed draws never changes, on any NumPy.
                random = np.random.RandomState([self._seed, epoch])
                permutation = random.permutation(self._n_samples)
                order[epochs == epoch] = permutation[order[epochs == epoch]]
        return order
