"""The dataset that all file formats are derived from: its paths, its open files, and which rows are read."""

from __future__ import annotations

import contextlib
import copy
import os
import platform
import stat
import threading
import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from chainer.dataset import DatasetMixin

from chainer_dist._counts import checked_count
from chainer_dist.collectives.failures import rebuild_error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainer_dist.datasets.formats.open_file import OpenFile, Paths, Positions

__all__ = ["Stamp", "StoredDataset"]


class Stamp(NamedTuple):
    """By what a file is recognized.

    Attributes:
        size: Bytes.
        modified: Time of the last change, in nanoseconds.
        host: Machine that looked; machines may have copies that were made at different times.
    """

    size: int
    modified: int
    host: str

    def differs_from(self, other: Stamp) -> bool:
        """Return whether a file has changed since the other was taken, or is another file."""
        is_same_host = self.host == other.host
        return self.size != other.size or (is_same_host and self.modified != other.modified)


class _File(NamedTuple):
    """What is known of a file without opening it."""

    path: str
    stamp: Stamp
    length: int
    schema: dict[str, str]
    index: Any


class StoredDataset(DatasetMixin):  # type: ignore[misc]  # Chainer has no types
    """The samples of one or several files of a format; see the classes of each format. Local.

    It holds paths. Each process opens a file when it wants a sample of it, also a process that was
    forked or spawned after that; pickling sends no open file. Several threads may read.

    More than fifteen methods: those of a dataset, those that each format has in its own way, and those that open files.

    Args:
        paths: Path of a file, or a list of paths, in the order of their samples.
        max_open: How many files a process keeps open at most, 1 or more.

    Attributes:
        reads_batches: Whether :class:`~chainer_dist.iterators.DistributedIterator` reads a list of indices at once:
            not from a class that is derived from this one and has a ``get_example`` or ``__getitem__`` of its own.
    """

    reads_batches = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = {"__getitem__", "get_example"} & vars(cls).keys()
        if own and "reads_batches" not in vars(cls):
            cls.reads_batches = False

    def __init__(self, paths: Paths, max_open: int) -> None:
        self._max_open = checked_count("max_open", max_open, 1)
        given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
        if not given:
            raise ValueError("paths is an empty list, expected one path or more")
        for path in given:
            if not isinstance(path, (str, os.PathLike)):
                raise TypeError(
                    f"paths is a path or a list of paths, got an object of {type(path).__name__}: "
                    f"{type(self).__name__} opens files by itself, in each process"
                )
        self._begin_process()
        self._files: list[_File] = []
        self._ends = np.zeros(1, dtype=np.int64)
        for path in given:
            self._files.append(self._describe(os.path.abspath(path)))  # noqa: PTH100 - may be text
        self._ends = np.cumsum([file.length for file in self._files], dtype=np.int64)

    @property
    def paths(self) -> list[str]:
        """Absolute paths of the files, in the order of their samples."""
        return [file.path for file in self._files]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: Any) -> Any:
        """Return one sample, or a list of samples that is read at once.

        Args:
            index: An integer, a slice, or integers as a list or an array of shape ``(k,)``. A
                negative one counts from the end.

        Raises:
            IndexError: If there is no such sample.
            TypeError: If it is none of these.
            Exception: Naming the file, if it cannot be read, or has changed.
        """
        if isinstance(index, slice):
            positions = np.arange(len(self), dtype=np.int64)[index]
        elif isinstance(index, (list, tuple, np.ndarray)) and np.ndim(index):
            positions = self._positions(index)
        else:
            return self.get_example(index)
        if type(self).get_example is not StoredDataset.get_example:  # such as one that augments
            return [self.get_example(position) for position in positions.tolist()]
        return self._read(positions)

    def get_example(self, i: int) -> Any:
        """Return sample ``i``; a negative one counts from the end."""
        return self._read(self._positions([i]))[0]

    def check(self) -> None:
        """Look whether this process finds the files that were described at first. Local.

        All of them must be there with the same size; the first one is opened.

        Raises:
            Exception: Naming the file, if one is not there or another one.
        """
        self._library()
        for file in self._files:
            self._check_stamp(file)
        with self._lock:
            self._file(0)

    def close(self) -> None:
        """Close the files that this process has open. Local. They are opened again when needed."""
        with self._lock:
            while self._opened:
                self._opened.popitem()[1].close()

    def _library(self) -> Any:
        """Import the library that reads the format."""

    def _open(self, path: str, index: Any) -> OpenFile:
        """Open a file.

        Args:
            path: Absolute path.
            index: What :attr:`OpenFile.index` was at the first opening, None at the first.
        """
        raise NotImplementedError

    def _decode(self, number: int, positions: Positions, stored: Sequence[Any]) -> Sequence[Any]:
        """Make samples of what is stored of them, while other threads may read."""
        del number, positions
        return stored

    def _is_folder(self, path: str) -> bool:
        """Return whether the format has folders in the place of files, and this is one."""
        del path
        return False

    def _parts(self, path: str) -> list[str]:
        """Return the files by whose size and time a path is recognized."""
        return [path]

    def _positions(self, index: Any) -> Positions:
        array = np.asarray(index)
        if array.size == 0:
            return np.zeros(0, np.int64)
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise TypeError(
                f"an index of {type(self).__name__} is an integer, a slice, or integers of shape "
                f"(k,); got {index!r}"
            )
        n = len(self)
        outside = (array < -n) | (array >= n)
        if outside.any():
            raise IndexError(f"index {array[outside][0]} is out of range for {n} samples")
        positions: Positions = np.where(array < 0, array + n, array).astype(np.int64)
        return positions

    def _read(self, wanted: Positions) -> list[Any]:
        samples: list[Any] = [None] * len(wanted)
        numbers = np.searchsorted(self._ends, wanted, side="right")
        for number in np.unique(numbers).tolist():
            (places,) = np.nonzero(numbers == number)
            begin = self._ends[number] - self._files[number].length
            positions, source = np.unique(wanted[places] - begin, return_inverse=True)
            rows = self._read_file(number, positions)
            given: set[int] = set()
            for place, row in zip(places.tolist(), source.tolist()):
                samples[place] = copy.deepcopy(rows[row]) if row in given else rows[row]
                given.add(row)
        return samples

    def _read_file(self, number: int, positions: Positions) -> Sequence[Any]:
        with self._lock:
            file = self._file(number)
            try:
                stored = file.read(positions)
            except Exception as error:
                path = self._files[number].path
                raise rebuild_error(
                    type(error), f"{path}: samples {_brief(positions)} cannot be read: {error}"
                ) from error
        return self._decode(number, positions, stored)

    def _file(self, number: int) -> OpenFile:
        """Return an open file, opened by this process. With the lock."""
        with contextlib.suppress(IndexError):  # until there are none
            while True:
                _INHERITED.pop().close()
        if number in self._opened:
            self._opened.move_to_end(number)
            return self._opened[number]
        known = self._files[number]
        self._check_stamp(known)
        opened = self._opening(known.path, known.index)
        if (opened.length, opened.schema) != (known.length, known.schema):
            opened.close()
            now = f"{opened.length} samples with {opened.schema}"
            then = f"{known.length} samples with {known.schema}"
            raise RuntimeError(f"{known.path} has {now} here, it had {then} when it was described")
        self._keep(number, opened)
        return opened

    def _describe(self, path: str) -> _File:
        """Open a file for the first time."""
        stamp = self._stamp(path)
        opened = self._opening(path, None)
        number = len(self._files)
        if number and opened.schema != self._files[0].schema:
            first = self._files[0]
            opened.close()
            raise ValueError(
                f"{path} has {opened.schema}, expected {first.schema} as in {first.path}"
            )
        self._keep(number, opened)
        return _File(path, stamp, opened.length, opened.schema, opened.index)

    def _keep(self, number: int, opened: OpenFile) -> None:
        self._opened[number] = opened
        while len(self._opened) > self._max_open:
            self._opened.popitem(last=False)[1].close()

    def _opening(self, path: str, index: Any) -> OpenFile:
        self._library()
        try:
            return self._open(path, index)
        except Exception as error:
            raise rebuild_error(
                type(error), f"{path} cannot be opened by {type(self).__name__}: {error}"
            ) from error

    def _stamp(self, path: str) -> Stamp:
        host = platform.node()
        try:
            is_folder = self._is_folder(path)
            found = [os.stat(part) for part in self._parts(path)]  # noqa: PTH116 - text
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error.filename} is not there on {host}: put it where all ranks find it under this "
                "path, on a shared file system or on each machine"
            ) from error
        if not is_folder and not all(stat.S_ISREG(each.st_mode) for each in found):
            raise OSError(f"{path} is not a regular file")
        modified = max(each.st_mtime_ns for each in found)
        return Stamp(sum(each.st_size for each in found), modified, host)

    def _check_stamp(self, file: _File) -> None:
        now = self._stamp(file.path)
        if now.differs_from(file.stamp):
            raise RuntimeError(
                f"{file.path} on {now.host} is not the file that was described on {file.stamp.host}, "
                f"or has changed since: it has {now.size} bytes, it had {file.stamp.size}. Let all "
                "ranks have the same file, leave it as it is while it is read, and make the dataset "
                "anew after a change"
            )

    def _begin_process(self) -> None:
        """Forget what another process has open, and the lock that one of its threads may hold."""
        self._lock = threading.Lock()
        self._opened: OrderedDict[int, OpenFile] = OrderedDict()
        _ALIVE.add(self)

    def __getstate__(self) -> dict[str, Any]:
        own = ("_lock", "_opened")
        return {name: value for name, value in vars(self).items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin_process()

    def __repr__(self) -> str:
        names = ", ".join(map(repr, self.paths[:3])) + (", ..." if len(self.paths) > 3 else "")  # noqa: PLR2004
        return f"<{type(self).__name__} of {len(self)} samples in {names}>"


_ALIVE: weakref.WeakSet[StoredDataset] = weakref.WeakSet()

# What a forked process has open of the other; it closes them before it opens a file.
_INHERITED: list[OpenFile] = []


def _begin_child() -> None:
    """Let all datasets of a forked process open files by themselves."""
    for dataset in [*_ALIVE]:
        _INHERITED.extend(dataset._opened.values())  # noqa: SLF001 - this module's own
        dataset._begin_process()  # noqa: SLF001 - this module's own


os.register_at_fork(after_in_child=_begin_child)


def _brief(positions: Positions) -> str:
    shown = ", ".join(map(str, positions[:3].tolist()))
    return f"{shown} and {len(positions) - 3} more" if len(positions) > 3 else shown  # noqa: PLR2004
