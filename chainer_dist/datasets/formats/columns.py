"""What formats with named columns have in common."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from chainer_dist.datasets.formats.stored import StoredDataset

if TYPE_CHECKING:
    from collections.abc import Callable

    from chainer_dist.datasets.formats.open_file import Paths, Positions

__all__ = [
    "BlockCache",
    "ColumnArrays",
    "ColumnDataset",
    "Columns",
    "arrays_of",
    "assemble",
    "check_columns",
    "choose",
]

# One name: samples are its values. Several: tuples in their order. None: dicts of all there are.
Columns = Union[str, Sequence[str], None]


def check_columns(columns: Columns) -> str | tuple[str, ...] | None:
    """Return the names of columns as they are kept. Local.

    Raises:
        TypeError: If they are no name, no list of names and not None.
        ValueError: If there are none, or one is there twice.
    """
    if columns is None or isinstance(columns, str):
        return columns
    names = tuple(columns)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"columns is a name or a list of names, got {name!r} among them")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"columns is {list(names)}, expected one or more different names")
    return names


def choose(columns: str | tuple[str, ...] | None, there: Sequence[str]) -> list[str]:
    """Return the columns to be read of a file. Local.

    Args:
        columns: As :func:`check_columns` returns them.
        there: Those that the file has.

    Raises:
        ValueError: If the file lacks one, or has none at all.
    """
    if not there:
        raise ValueError("it has no columns")
    wanted = [*there] if columns is None else [columns] if isinstance(columns, str) else [*columns]
    for name in wanted:
        if name not in there:
            raise ValueError(f"there is no column {name!r}, there are {sorted({*there})}")
    return wanted


def arrays_of(
    columns: str | tuple[str, ...] | None, top: Sequence[str], find: Callable[[str], Any]
) -> dict[str, Any]:
    """Return the arrays that are the columns to be read of a file, by name. Local.

    Args:
        columns: Names as :func:`check_columns` returns them; an array may be within groups.
        top: Names of the arrays that are not within groups.
        find: Function that returns the array of a name, or None if the file has no such array.

    Raises:
        ValueError: If the file lacks a column, or has none at all.
    """
    names = (columns,) if isinstance(columns, str) else columns or ()
    there = [*top, *(name for name in names if find(name) is not None)]
    return {name: find(name) for name in choose(columns, there)}


def assemble(columns: str | tuple[str, ...] | None, values: Mapping[str, Any]) -> list[Any]:
    """Return samples, given the values of each column, for each sample one. Local."""
    if columns is None:
        return [dict(zip(values, row)) for row in zip(*values.values())]
    if isinstance(columns, str):
        return list(values[columns])
    return list(zip(*(values[name] for name in columns)))


class ColumnDataset(StoredDataset):
    """Rows of files of which blocks are read as a whole, and kept. Local.

    Args:
        paths: Path of a file, or a list of paths, in the order of their samples.
        columns: Names of columns; see :data:`Columns`.
        cache_bytes: Bytes of the blocks that each process keeps; the formats say of what.
        max_open: How many files a process keeps open at most.
    """

    def __init__(
        self,
        paths: Paths,
        columns: Columns = None,
        *,
        cache_bytes: int = 64 << 20,
        max_open: int = 16,
    ) -> None:
        self._columns = check_columns(columns)
        self._cache_bytes = cache_bytes
        super().__init__(paths, max_open)


class ColumnArrays:
    """The columns of an open file that are arrays of equal length. Local.

    Args:
        columns: Names as :func:`check_columns` returns them.
        arrays: The arrays by name, with the attributes ``shape`` and ``dtype``.

    Attributes:
        length: Number of rows.
        schema: Dtype and shape of the rows of each column, in words.

    Raises:
        ValueError: If an array has no dimension, or arrays have different lengths.
    """

    index = None

    def __init__(self, columns: str | tuple[str, ...] | None, arrays: Mapping[str, Any]) -> None:
        self._columns = columns
        self._arrays = arrays
        for name, array in arrays.items():
            if not array.shape:
                raise ValueError(f"its column {name!r} has no dimension, and no rows")
        lengths = {name: array.shape[0] for name, array in arrays.items()}
        if len({*lengths.values()}) > 1:
            raise ValueError(f"its columns have different numbers of rows: {lengths}")
        self.length: int = next(iter(lengths.values()))
        self.schema = {
            name: f"{array.dtype} of shape {tuple(array.shape[1:])}"
            for name, array in arrays.items()
        }


class BlockCache:
    """Blocks of rows that can only be read as a whole, of which the last ones are kept.

    Args:
        capacity: Bytes that are kept; the block read last is, whatever its size.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._blocks: OrderedDict[Any, Any] = OrderedDict()
        self._used = 0

    def rows(
        self, positions: Positions, ends: Positions, read: Callable[[int], Any], key: Any
    ) -> Any:
        """Return copies of some rows, in an array of shape ``(k, ...)``.

        Args:
            positions: Ascending; shape ``(k,)``, with ``k`` at least 1.
            ends: Number of the row after each block, ascending.
            read: Reads a block, given its number: an array of its rows.
            key: Of the column, beside the number of the block.
        """
        numbers = np.searchsorted(ends, positions, side="right")
        taken = []
        for number in np.unique(numbers).tolist():
            begin = ends[number - 1] if number else 0
            block = self._block((key, number), read)
            taken.append(block[positions[numbers == number] - begin])
        found = taken[0] if len(taken) == 1 else np.concatenate(taken)
        return copy.deepcopy(found) if found.dtype == object else found

    def _block(self, key: tuple[Any, int], read: Callable[[int], Any]) -> Any:
        if key in self._blocks:
            self._blocks.move_to_end(key)
            return self._blocks[key]
        block = self._blocks[key] = read(key[1])
        self._used += block.nbytes
        while self._used > self._capacity and len(self._blocks) > 1:
            self._used -= self._blocks.popitem(last=False)[1].nbytes
        return block
