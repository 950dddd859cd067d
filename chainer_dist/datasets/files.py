"""A dataset of many files, of which few are open at a time."""

from __future__ import annotations

import bisect
import functools
import itertools
import os
from typing import TYPE_CHECKING, Any

import numpy as np
from chainer.dataset import DatasetMixin

from chainer_dist._counts import checked_count
from chainer_dist._files import open_regular
from chainer_dist.collectives.failures import rebuild_error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class FilesDataset(DatasetMixin):  # type: ignore[misc]  # Chainer has no types
    """The samples of all files one after another, each file opened when a sample of it is wanted.

    Local. It pickles as the names of the files, so that data-loader processes, whether forked or
    spawned, open them by themselves.

    For example, with files that ``numpy.savez`` wrote::

        dataset = chainer_dist.datasets.FilesDataset(["part0.npz", "part1.npz"])
        sample = dataset[0]  # a dict with a row of each array

    Args:
        paths: Files, in the order of their samples.
        open_file: Called with a path; returns the file's samples, as anything with ``__len__`` and
            ``__getitem__(int)``. It may be called several times for a file, and should leave
            reading to the samples where it can. For ``spawn`` and ``forkserver`` it must be a
            function of an importable module.
        lengths: How many samples each file has. None opens every file once to find out.
        max_open: How many files are kept open at most. What ``open_file`` returned for the one
            that was not used for longest is then dropped.

    Raises:
        ValueError: If ``max_open`` is not positive, or there is not one length for each file.
        Exception: Naming the file, if one cannot be opened.
    """

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        open_file: Callable[[str], Any] | None = None,
        lengths: Sequence[int] | None = None,
        max_open: int = 16,
    ) -> None:
        self._paths = names_of(paths)
        self._open_file = open_arrays if open_file is None else open_file
        self._max_open = checked_count("max_open", max_open, 1)
        if lengths is None:
            lengths = [count_samples(path, self._open_file) for path in self._paths]
        if len(lengths) != len(self._paths):
            raise ValueError(f"there are {len(lengths)} lengths for {len(self._paths)} files")
        self._lengths = [int(length) for length in lengths]
        self._ends = [*itertools.accumulate(self._lengths)]
        # Safe to call from several threads.
        self._opened = functools.lru_cache(self._max_open)(self._open_file)

    @property
    def paths(self) -> list[str]:
        """The files, in the order of their samples."""
        return list(self._paths)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def get_example(self, i: int) -> Any:
        """Return sample ``i``, as its file has it; a negative one counts from the end."""
        index = range(len(self))[i]
        number = bisect.bisect_right(self._ends, index)
        begin = self._ends[number] - self._lengths[number]
        return self._opened(self._paths[number])[index - begin]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._paths, self._open_file, self._lengths, self._max_open)


def open_arrays(path: str | os.PathLike[str]) -> Any:
    """Open an ``.npy`` or ``.npz`` file as a dataset. Local.

    Args:
        path: File that ``numpy.save``, ``numpy.savez`` or ``numpy.savez_compressed`` wrote.

    Returns:
        For ``.npy`` the rows of the array, of shape ``(n, ...)``. The file is mapped, and of
        it only what holds a wanted row is read. For ``.npz`` dicts with a row of each of its
        arrays, which all have ``n`` rows; they are loaded as a whole when the first row is wanted.
        Rows are new, writable arrays of shape ``(...)`` (scalars for arrays of shape ``(n,)``).

    Raises:
        OSError, ValueError, TypeError: If there is no such file, or it is no such array. Arrays of objects
            are refused, as loading them can run any code.
    """
    with open_regular(path, follow=True):
        pass  # a named pipe would wait for a writer
    loaded = np.load(path, mmap_mode="r", allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return _Rows(np.asarray(loaded))  # plain arrays travel in a data loader's shared memory
    with loaded:
        return _Columns(os.fspath(path), {name: _n_rows(loaded, name) for name in loaded.files})


class _Rows:
    """The rows of an array, each read when it is indexed, and not before."""

    def __init__(self, array: np.ndarray[Any, np.dtype[Any]]) -> None:
        self._array = array
        self._length = len(array)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        return self._array[index].copy()


class _Columns:
    """The arrays of an .npz file, row by row."""

    def __init__(self, path: str, lengths: dict[str, int]) -> None:
        if len(set(lengths.values())) > 1:
            raise ValueError(f"its arrays have different numbers of rows: {lengths}")
        self._path = path
        self._length = next(iter(lengths.values()), 0)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: rows[index] for name, rows in self._columns.items()}

    @functools.cached_property
    def _columns(self) -> dict[str, _Rows]:
        with np.load(self._path, allow_pickle=False) as loaded:
            return {name: _Rows(loaded[name]) for name in loaded.files}


def _n_rows(loaded: Any, name: str) -> int:
    """Return the number of rows of an array in an .npz file, reading its header only."""
    with loaded.zip.open(f"{name}.npy") as member:
        if np.lib.format.read_magic(member) == (1, 0):
            shape, _, _ = np.lib.format.read_array_header_1_0(member)
        else:  # rare: names of fields that are not ASCII
            shape = loaded[name].shape
    if not shape:
        raise TypeError(f"its array {name} is 0-dimensional, and has no rows")
    return int(shape[0])


def count_samples(path: str, open_file: Callable[[str], Any]) -> int:
    """Return how many samples a file has. Local.

    Raises:
        Exception: An error of the class that ``open_file`` or ``len`` raised; it names the file.
    """
    try:
        return len(open_file(path))
    except Exception as error:
        raise rebuild_error(
            type(error), f"{path} cannot be opened as a dataset: {error}"
        ) from error


def names_of(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Return the names of files as a list of strings. Local.

    Raises:
        TypeError: If it is no list of paths, but for instance a single one.
    """
    if isinstance(paths, (str, bytes)):
        raise TypeError(f"paths is a list of paths, got the single {paths!r}")
    return [os.fspath(path) for path in paths]
