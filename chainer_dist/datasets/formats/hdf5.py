"""Rows of the datasets in HDF5 files, read by h5py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from chainer_dist.datasets.formats.columns import (
    ColumnArrays,
    ColumnDataset,
    arrays_of,
    assemble,
)
from chainer_dist.datasets.formats.open_file import require

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainer_dist.datasets.formats.open_file import Positions

__all__ = ["HDF5Dataset"]

_SLOTS = 100_003  # of the table that finds chunks in the cache; a prime, so that few share one


class HDF5Dataset(ColumnDataset):
    """Rows of one or several HDF5 datasets of equal length, such as images and labels. Local.

    Needs h5py (``pip install 'chainer_dist[hdf5]'``). Only the rows that are asked for are read;
    of a dataset with chunks (a compressed one has some) the chunks that they are in. Made on one
    rank and given to :func:`~chainer_dist.scatter_dataset`, or made on all ranks for a
    :class:`~chainer_dist.iterators.DistributedIterator`. Each process opens the file by itself::

        train = chainer_dist.datasets.HDF5Dataset("train.h5", columns=["image", "label"])
        train = chainer_dist.scatter_dataset(train, comm, shuffle=True)

    Args:
        paths: Path of a file, or a list of paths of files with the same columns, in the order of
            their samples.
        columns: Names of HDF5 datasets, such as ``"train/image"``. A list makes each sample a tuple
            in that order. A single name makes it the row itself. None makes it a dict of all
            datasets at the top of the file.
        cache_bytes: Bytes of the chunks that each process keeps for each column.
        max_open: How many files a process keeps open at most.

    Raises:
        ImportError: If h5py is not installed; the text has the command that installs it.
        FileNotFoundError: If there is no such file.
        OSError, ValueError: Naming the file, if it is no HDF5 file, lacks a column, or has columns of
            different lengths.

    A row is a new, writable array of the dtype that is stored, or a NumPy scalar where the HDF5
    dataset has one dimension.
    """

    def _library(self) -> Any:
        return require("h5py", type(self).__name__, "hdf5")

    def _open(self, path: str, index: Any) -> _HDF5File:
        del index
        h5py = self._library()
        file = h5py.File(path, "r", rdcc_nbytes=self._cache_bytes, rdcc_nslots=_SLOTS)
        try:
            return _HDF5File(file, self._columns, h5py)
        except BaseException:
            file.close()
            raise


class _HDF5File(ColumnArrays):
    """An open file."""

    def __init__(self, file: Any, columns: str | tuple[str, ...] | None, h5py: Any) -> None:
        def find(name: str) -> Any:
            found = file.get(name)
            return found if isinstance(found, h5py.Dataset) else None

        self._file = file
        top = [name for name in file if find(name) is not None]
        super().__init__(columns, arrays_of(columns, top, find))

    def read(self, positions: Positions) -> Sequence[Any]:
        """Return rows."""
        begin, end = int(positions[0]), int(positions[-1]) + 1
        where: Any = slice(begin, end) if end - begin == len(positions) else positions
        return assemble(
            self._columns, {name: np.asarray(each[where]) for name, each in self._arrays.items()}
        )

    def close(self) -> None:
        """Close it."""
        self._file.close()
