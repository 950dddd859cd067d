"""Rows of the arrays in a Zarr group, read by zarr 2 or 3."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chainer_dist.datasets.formats.columns import (
    BlockCache,
    ColumnArrays,
    ColumnDataset,
    arrays_of,
    assemble,
)
from chainer_dist.datasets.formats.open_file import require

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainer_dist.datasets.formats.open_file import Positions

__all__ = ["ZarrDataset"]

_METADATA = ("zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata")


class ZarrDataset(ColumnDataset):
    """Rows of one or several arrays of a Zarr group, or of one array. Local.

    Needs zarr (``pip install 'chainer_dist[zarr]'``), version 2 or 3. Of each array the chunks that
    the rows are in are read, as a whole. The chunks used last are kept in memory, so that an order
    without shuffling reads each of them once. Each process opens the group by itself::

        train = chainer_dist.datasets.ZarrDataset("train.zarr", columns=["image", "label"])

    Args:
        paths: Path of a group or an array, a folder or a ``.zip`` file; or a list of paths of groups
            with the same columns, in the order of their samples.
        columns: Names of arrays in the group, such as ``"train/image"``. A list makes each sample a
            tuple in that order. A single name makes it the row itself. None makes it a dict of all
            arrays at the top of the group, or the row itself where there is one array and no group.
        cache_bytes: Bytes of the decoded chunks that each process keeps, for each file.
        max_open: How many groups a process keeps open at most.

    Raises:
        ImportError: If zarr is not installed; the text has the command that installs it.
        FileNotFoundError: If there is no such folder or file.
        OSError, ValueError: Naming the path, if it is no Zarr group, lacks a column, or has columns of
            different lengths.

    A row is a new, writable array of the dtype that is stored, or a NumPy scalar where the array has
    one dimension. A chunk that is missing has the fill value in all rows: so the format defines it.
    """

    def _library(self) -> Any:
        return require("zarr", type(self).__name__, "zarr")

    def _is_folder(self, path: str) -> bool:
        return Path(path).is_dir()

    def _parts(self, path: str) -> list[str]:
        """Return the metadata of the group and of the arrays: its chunks may be millions of files."""
        if not self._is_folder(path):
            return [path]
        names = [self._columns] if isinstance(self._columns, str) else self._columns or ()
        folders = [Path(path), *(Path(path, name) for name in names)]
        found = [str(each / name) for each in folders for name in _METADATA]
        parts = [each for each in found if Path(each).is_file()]
        return parts or [path]

    def _open(self, path: str, index: Any) -> _ZarrFile:
        del index
        zarr = self._library()
        # What else a file may be, versions 2 and 3 of the library guess differently.
        store = path if self._is_folder(path) else zarr.storage.ZipStore(path, mode="r")
        opened = zarr.open(store, mode="r")
        try:
            return _ZarrFile(opened, self._columns, self._cache_bytes)
        except BaseException:
            _close(opened)
            raise


class _ZarrFile(ColumnArrays):
    """An open group or array."""

    def __init__(
        self, opened: Any, columns: str | tuple[str, ...] | None, cache_bytes: int
    ) -> None:
        def find(name: str) -> Any:
            found = opened.get(name)
            return found if hasattr(found, "shape") else None

        self._opened = opened
        if not hasattr(opened, "shape"):
            top = [name for name, _ in opened.arrays()]
            super().__init__(columns, arrays_of(columns, top, find))
        elif columns is None:
            super().__init__("", {"": opened})
        else:
            raise ValueError(f"it is one array without a group: columns {columns!r} must be None")
        self._cache = BlockCache(cache_bytes)

    def read(self, positions: Positions) -> Sequence[Any]:
        """Return rows."""
        return assemble(self._columns, {name: self._rows(name, positions) for name in self._arrays})

    def _rows(self, name: str, positions: Positions) -> Any:
        array, length = self._arrays[name], self.length
        step = array.chunks[0]
        ends = np.minimum(np.arange(step, length + step, step, dtype=np.int64), length)

        def read(number: int) -> Any:
            return np.asarray(array[number * step : min((number + 1) * step, length)])

        return self._cache.rows(positions, ends, read, name)

    def close(self) -> None:
        """Close it."""
        _close(self._opened)


def _close(opened: Any) -> None:
    close = getattr(opened.store, "close", None)
    if close is not None:  # that of a .zip file has it
        close()
