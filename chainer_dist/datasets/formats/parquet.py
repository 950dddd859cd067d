"""Rows of Parquet files, read by pyarrow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from chainer_dist.datasets.formats.columns import (
    BlockCache,
    ColumnDataset,
    assemble,
    choose,
)
from chainer_dist.datasets.formats.open_file import require

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainer_dist.datasets.formats.open_file import Positions

__all__ = ["ParquetDataset"]


class ParquetDataset(ColumnDataset):
    """Rows of Parquet files. Local.

    Needs pyarrow (``pip install 'chainer_dist[parquet]'``). Of each column the row groups that the
    rows are in are read, as a whole. The row groups used last are kept in memory, so that an
    order without shuffling reads each of them once. For a shuffled order write small row groups, or
    let ``cache_bytes`` have room for the columns. Each process opens the files by itself::

        train = chainer_dist.datasets.ParquetDataset(glob.glob("train/*.parquet"), ["x", "label"])

    Args:
        paths: Path of a file, or a list of paths of files with the same columns, in the order of
            their samples.
        columns: Names of columns. A list makes each sample a tuple in that order. A single name
            makes it the value itself. None makes it a dict of all columns.
        cache_bytes: Bytes of the decoded row groups that each process keeps, for each file.
        max_open: How many files a process keeps open at most.

    Raises:
        ImportError: If pyarrow is not installed; the text has the command that installs it.
        FileNotFoundError: If there is no such file.
        OSError, ValueError: Naming the file, if it is no Parquet file or lacks a column.

    Numbers and booleans become NumPy scalars of their type, fixed-size lists and tensors writable
    arrays of their shape, lists of numbers arrays of one dimension, and texts, bytes and everything
    else the Python objects of pyarrow. A missing value among numbers is an error when it is read.
    """

    def _library(self) -> Any:
        return require("pyarrow.parquet", type(self).__name__, "parquet")

    def _open(self, path: str, index: Any) -> _ParquetFile:
        del index
        file = self._library().ParquetFile(path)
        try:
            return _ParquetFile(file, self._columns, self._cache_bytes)
        except BaseException:
            file.close()
            raise


class _ParquetFile:
    """An open file."""

    index = None

    def __init__(self, file: Any, columns: str | tuple[str, ...] | None, cache_bytes: int) -> None:
        self._file = file
        self._columns = columns
        schema = file.schema_arrow
        self._names = choose(columns, schema.names)
        self.length = file.metadata.num_rows
        self.schema = {name: str(schema.field(name).type) for name in self._names}
        groups = range(file.metadata.num_row_groups)
        self._ends = np.cumsum(
            [file.metadata.row_group(n).num_rows for n in groups], dtype=np.int64
        )
        self._cache = BlockCache(cache_bytes)

    def read(self, positions: Positions) -> Sequence[Any]:
        """Return rows."""
        values = {
            name: self._cache.rows(positions, self._ends, self._reader(name), name)
            for name in self._names
        }
        return assemble(self._columns, values)

    def _reader(self, name: str) -> Any:
        def read(number: int) -> Any:
            # The threads of pyarrow would compete with the other ranks for the cores.
            table = self._file.read_row_group(number, columns=[name], use_threads=False)
            return _to_rows(table.column(name).combine_chunks(), name)

        return read

    def close(self) -> None:
        """Close it."""
        self._file.close()


def _to_rows(column: Any, name: str) -> Any:
    """Return the values of a column, an arrow array of length ``n``, as an array of ``n`` rows."""
    import pyarrow as pa

    if isinstance(column, pa.ChunkedArray):  # of no chunks, or of more than one array can hold
        column = pa.concat_arrays(column.chunks)
    kind = column.type
    if isinstance(kind, pa.BaseExtensionType) and not isinstance(kind, pa.FixedShapeTensorType):
        return _to_rows(column.storage, name)
    if pa.types.is_dictionary(kind):
        return _to_rows(column.dictionary_decode(), name)
    if not _is_numeric(kind):
        return _objects(column.to_pylist())
    if column.null_count:
        raise ValueError(
            f"column {name!r} has {column.null_count} missing values in this row group, for which "
            f"{kind} has no number: write a number there, or leave the rows out"
        )
    if isinstance(kind, pa.FixedShapeTensorType):
        rows = column.to_numpy_ndarray()
    elif pa.types.is_fixed_size_list(kind):
        below = _to_rows(column.flatten(), name)
        rows = below.reshape(len(column), kind.list_size, *below.shape[1:])
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        rows = _lists(column, _to_rows(column.flatten(), name))
    else:
        rows = column.to_numpy(zero_copy_only=False)
    return rows


def _is_numeric(kind: Any) -> bool:
    """Return whether values are numbers, or lists of such of any depth."""
    import pyarrow as pa

    types = pa.types
    if isinstance(kind, pa.FixedShapeTensorType):
        return True
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_numeric(kind.value_type)
    return bool(types.is_primitive(kind))


def _lists(column: Any, values: Any) -> Any:
    """Return lists of any lengths, given their values one after another, as an array of objects."""
    lengths = column.value_lengths().to_numpy(zero_copy_only=False)
    ends = np.cumsum(lengths)
    return _objects([values[end - length : end] for end, length in zip(ends, lengths)])


def _objects(values: list[Any]) -> Any:
    rows = np.empty(len(values), dtype=object)
    for i, value in enumerate(values):  # an assignment at once would look into lists
        rows[i] = value
    return rows
