"""Samples of tar files in the layout of WebDataset, found by an index of offsets."""

from __future__ import annotations

import os
import tarfile
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from chainer_dist._files import open_regular
from chainer_dist.collectives.failures import rebuild_error
from chainer_dist.datasets.formats.columns import Columns, assemble, check_columns, choose
from chainer_dist.datasets.formats.decode import decode_member
from chainer_dist.datasets.formats.stored import StoredDataset

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from chainer_dist.datasets.formats.open_file import Paths, Positions

__all__ = ["TarDataset"]

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZ": "bzip2",
    b"\xfd7": "xz",
    b"\x28\xb5": "zstd",
}


class TarDataset(StoredDataset):
    """Samples of tar files in the layout of WebDataset. Local.

    The files of a sample follow one another in the tar file, and have equal names up to the first
    dot: ``0001.png`` and ``0001.cls``, for instance. Where each of them begins is found once, when
    the dataset is made, and sent along with it; from then on the wanted files alone are read, in
    any order. Each process opens the tar files by itself. Nothing has to be installed, but Pillow
    for images::

        train = chainer_dist.datasets.TarDataset(sorted(glob.glob("train-*.tar")), ["png", "cls"])
        train = chainer_dist.scatter_dataset(train, comm, shuffle=True)

    Args:
        paths: Path of a tar file that is not compressed, or a list of paths, in the order of their
            samples.
        columns: What follows the first dot of the names, in lower case. A list makes each sample a
            tuple in that order. A single one makes it the value itself. None makes it a dict of all.
        decode: Called with such an ending and the bytes of the file, returns the value. For worker
            processes that are spawned it must be a function of an importable module. None stands for
            :func:`~chainer_dist.datasets.decode_member`.
        max_open: How many files a process keeps open at most.

    Raises:
        FileNotFoundError: If there is no such file.
        Exception: Naming the file: ``tarfile.ReadError`` if it is no tar file, damaged or truncated,
            ValueError if it is compressed or a sample lacks a column. What ``decode`` raises, naming
            file and sample.
    """

    def __init__(
        self,
        paths: Paths,
        columns: Columns = None,
        decode: Callable[[str, bytes], Any] | None = None,
        *,
        max_open: int = 16,
    ) -> None:
        self._columns = check_columns(columns)
        self._decode_value = decode_member if decode is None else decode
        super().__init__(paths, max_open)

    def _open(self, path: str, index: Any) -> _TarFile:
        return _TarFile(path, _list_members(path, self._columns) if index is None else index)

    def _decode(self, number: int, positions: Positions, stored: Sequence[Any]) -> Sequence[Any]:
        names = self._files[number].index.names
        values: dict[str, list[Any]] = {name: [] for name in names}
        for position, members in zip(positions.tolist(), stored):
            for name, data in zip(names, members):
                try:
                    values[name].append(self._decode_value(name, data))
                except Exception as error:  # noqa: PERF203 - the error names the sample
                    path = self._files[number].path
                    raise rebuild_error(
                        type(error),
                        f"{path}: .{name} of sample {position} of the file cannot be decoded: {error}",
                    ) from error
        return assemble(self._columns, values)


class _Index(NamedTuple):
    """Where the files of each sample are: int64 arrays of shape ``(samples, columns)``."""

    names: list[str]
    offsets: np.ndarray[Any, np.dtype[np.int64]]
    sizes: np.ndarray[Any, np.dtype[np.int64]]


class _TarFile:
    """An open file."""

    def __init__(self, path: str, index: _Index) -> None:
        self._file = open_regular(path, follow=True)
        self.index = index
        self.length = len(index.offsets)
        self.schema = dict.fromkeys(index.names, "files")

    def read(self, positions: Positions) -> Sequence[Any]:
        """Return for each sample the bytes of its files."""
        return [
            [
                self._bytes(offset, size)
                for offset, size in zip(
                    self.index.offsets[k].tolist(), self.index.sizes[k].tolist()
                )
            ]
            for k in positions.tolist()
        ]

    def _bytes(self, offset: int, size: int) -> bytes:
        data = os.pread(self._file.fileno(), size, offset)
        while len(data) < size:  # more than 2 GiB take several calls
            more = os.pread(self._file.fileno(), size - len(data), offset + len(data))
            if not more:
                raise EOFError(f"it ends within the {size} bytes that begin at {offset}")
            data += more
        return data

    def close(self) -> None:
        """Close it."""
        self._file.close()


def _list_members(path: str, columns: str | tuple[str, ...] | None) -> _Index:
    """Read the headers of a tar file."""
    keys: list[str] = []
    samples: list[dict[str, tuple[int, int]]] = []
    for member in _headers(path):
        folder, _, name = member.name.rpartition("/")
        stem, _, extension = name.partition(".")
        if not stem or not extension:
            continue
        key, extension = f"{folder}/{stem}".lstrip("/"), extension.lower()
        if not keys or keys[-1] != key:
            keys.append(key)
            samples.append({})
        if extension in samples[-1]:
            raise ValueError(f"sample {key!r} has two files .{extension}")
        samples[-1][extension] = (member.offset_data, member.size)
    if not samples:
        raise ValueError("there are no samples: no files with a name and an ending")
    names = choose(columns, sorted({name for sample in samples for name in sample}))
    for key, sample in zip(keys, samples):
        for name in names:
            if name not in sample:
                raise ValueError(
                    f"sample {key!r} has no .{name}, but {sorted(sample)}; the files of a sample "
                    "follow one another, and have one name up to the first dot"
                )
    places = np.array([[sample[name] for name in names] for sample in samples], dtype=np.int64)
    return _Index(names, places[:, :, 0].copy(), places[:, :, 1].copy())


def _headers(path: str) -> Iterator[tarfile.TarInfo]:
    """Yield the headers of the ordinary files in a tar file.

    Raises:
        ValueError: If it is compressed.
        tarfile.TarError: If it is damaged.
    """
    with open_regular(path, follow=True) as file:
        compression = _COMPRESSED.get(os.pread(file.fileno(), 2, 0))
        if compression:
            raise ValueError(
                f"it is compressed by {compression}, and nothing can be read from its middle: unpack "
                "it to a plain .tar; images in it are compressed anyway"
            )
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                vars(archive)["members"].clear()  # it would keep all headers in memory
                if member.isreg() and not member.issparse():
                    yield member
            _check_end(file.fileno(), archive.offset)


def _check_end(descriptor: int, offset: int) -> None:
    """Raise if a tar file ends with something else than zeros: Python takes damaged headers for the end."""
    block = os.pread(descriptor, tarfile.BLOCKSIZE, offset)
    if block and block != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"it is damaged: there is no header at byte {offset}")
