"""Values of LMDB databases, read by lmdb."""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from chainer_dist.collectives.failures import rebuild_error
from chainer_dist.datasets.formats.open_file import require
from chainer_dist.datasets.formats.stored import StoredDataset

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chainer_dist.datasets.formats.open_file import Paths, Positions

__all__ = ["LMDBDataset"]

# Of what LMDB has in the place of a value, where a key is the name of a database.
_DATABASE_BYTES = 8 + 5 * struct.calcsize("P")


class LMDBDataset(StoredDataset):
    """Values of LMDB databases, in the order of their keys. Local.

    Needs lmdb (``pip install 'chainer_dist[lmdb]'``). The file is mapped, and only what holds the
    wanted values is read. Each process opens it by itself, read-only and without a lock: nothing may
    write to it meanwhile. Keys are listed once, when the dataset is made, and sent along with it::

        def decode(value):
            record = np.frombuffer(value, np.uint8)
            return record[1:].reshape(1, 28, 28).astype(np.float32) / 255, np.int32(record[0])

        train = chainer_dist.datasets.LMDBDataset("train.lmdb", decode)

    Args:
        paths: Path of a database, a folder with ``data.mdb`` or a file; or a list of paths, in the
            order of their samples.
        decode: Called with the bytes of a value, returns the sample. For worker processes that are
            spawned it must be a function of an importable module. None leaves samples bytes.
        keys: The keys of the samples as bytes, in their order, for a single path. None stands for all
            keys in the order of the database, which is that of their bytes.
        max_open: How many databases a process keeps open at most.

    Raises:
        ImportError: If lmdb is not installed; the text has the command that installs it.
        FileNotFoundError: If there is no such database.
        ValueError: If there are keys, and several paths.
        Exception: Naming the path, if it is no database, is truncated, or has named databases within; naming
            the key, if it is not there or its value cannot be decoded.
    """

    def __init__(
        self,
        paths: Paths,
        decode: Callable[[bytes], Any] | None = None,
        *,
        keys: Sequence[bytes] | None = None,
        max_open: int = 16,
    ) -> None:
        self._decode_value = decode
        self._given = None if keys is None else _Keys(keys)
        if keys is not None and not isinstance(paths, (str, os.PathLike)):
            raise ValueError("keys are those of one database, and paths is a list: pass one path")
        super().__init__(paths, max_open)

    def _library(self) -> Any:
        return require("lmdb", type(self).__name__, "lmdb")

    def _parts(self, path: str) -> list[str]:
        return [_data_file(path)]

    def _open(self, path: str, index: Any) -> _LMDBFile:
        return _LMDBFile(path, self._library(), self._given if index is None else index)

    def _decode(self, number: int, positions: Positions, stored: Sequence[Any]) -> Sequence[Any]:
        if self._decode_value is None:
            return stored
        samples = []
        for position, value in zip(positions.tolist(), stored):
            try:
                samples.append(self._decode_value(value))
            except Exception as error:  # noqa: PERF203 - the error names the key
                file = self._files[number]
                key = file.index[position]
                raise rebuild_error(
                    type(error), f"{file.path}: the value of {key!r} cannot be decoded: {error}"
                ) from error
        return samples


class _Keys:
    """Keys one after another in one array, which ranks of a node share."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        lengths = [len(key) for key in keys]
        self._ends = np.cumsum(lengths, dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(keys), np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, position: int) -> bytes:
        begin = self._ends[position - 1] if position else 0
        return self._bytes[begin : self._ends[position]].tobytes()


class _LMDBFile:
    """An open database."""

    def __init__(self, path: str, lmdb: Any, keys: _Keys | None) -> None:
        self._shared: _Environment | None = _open_environment(path, lmdb)
        if keys is None:
            keys = _Keys(_list_keys(self._shared.environment, lmdb))
        self.index = keys
        self.length = len(keys)
        self.schema: dict[str, str] = {}

    def read(self, positions: Positions) -> Sequence[Any]:
        """Return values as bytes."""
        assert self._shared is not None  # noqa: S101 - for the type checker
        values = []
        with self._shared.environment.begin() as transaction:
            for position in positions.tolist():
                key = self.index[position]
                value = transaction.get(key)
                if value is None:
                    raise ValueError(f"there is no key {key!r}")
                values.append(value)
        return values

    def close(self) -> None:
        """Leave it to other datasets of this process that have it open; the last one closes it."""
        self._shared = None


def _list_keys(environment: Any, lmdb: Any) -> list[bytes]:
    """Return all keys, or raise ValueError if one is the name of another database of the same file."""
    found = []
    with environment.begin(buffers=True) as transaction:
        for key, value in transaction.cursor():
            found.append(bytes(key))
            if len(value) == _DATABASE_BYTES:
                with contextlib.suppress(lmdb.IncompatibleError):  # it is an ordinary value
                    environment.open_db(found[-1], txn=transaction, create=False)
                    raise ValueError(
                        f"it has a database named {found[-1]!r} within, whose values cannot be read: copy them to "
                        "a file of their own"
                    )
    return found


class _Environment:
    """An environment that all datasets of a process share: LMDB allows only one for each file."""

    def __init__(self, path: str, lmdb: Any) -> None:
        self.process = os.getpid()
        self.environment = lmdb.open(
            path,
            subdir=Path(path).is_dir(),
            readonly=True,
            create=False,
            lock=False,
            readahead=False,  # samples are read in any order
            max_dbs=1,  # to find out whether there is one
        )
        try:
            _check_size(_data_file(path), self.environment)
        except BaseException:
            self.environment.close()
            raise


def _check_size(path: str, environment: Any) -> None:
    """Raise if a file is shorter than it says: reading behind its end would be a fatal SIGBUS."""
    size = Path(path).stat().st_size
    needed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    if size < needed:
        raise OSError(f"it is truncated: it has {size} bytes of {needed}")


_ENVIRONMENTS: weakref.WeakValueDictionary[str, _Environment] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def _open_environment(path: str, lmdb: Any) -> _Environment:
    path = os.path.realpath(path)
    with _lock:
        shared = _ENVIRONMENTS.get(path)
        if shared is not None and shared.process != os.getpid():
            shared.environment.close()  # inherited by a fork: LMDB would take it for this process's
            shared = None
        if shared is None:
            shared = _ENVIRONMENTS[path] = _Environment(path, lmdb)
        return shared


def _renew_lock() -> None:
    """Let a forked process have a lock that no thread of the other holds."""
    global _lock  # noqa: PLW0603 - a lock is of a process
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


def _data_file(path: str) -> str:
    return str(Path(path, "data.mdb")) if Path(path).is_dir() else path
