"""Files of a trainer's state: written whole or not at all, checked, and loaded without pickle.

A pickle can run any code when it is loaded. Files of arrays need none, but for one thing: Chainer saves
None as an array of objects. That is recognized by what its pickle spells out, which is never run.
"""

from __future__ import annotations

import contextlib
import io
import math
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np

from chainer_dist._files import open_regular, replacing

if TYPE_CHECKING:
    import hashlib
    from collections.abc import Iterator
    from typing import IO

    from chainer_dist._typing import Array

# What a Checkpoint has in the place of None: an array that needs no pickle.
NONE = np.zeros((), dtype=[("None", np.bool_)])

_NPY = ".npy"
_LONGEST_NONE = 1000  # bytes of the pickle of an array with None
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_CHUNK = 1 << 20  # bytes read at a time
_LONGEST_DESCRIPTOR = 24  # bytes that may follow a member


class PickleRefusedError(ValueError):
    """A file has, or would get, an object that only pickle can store, without ``allow_pickle``."""


def is_none(array: Any) -> bool:
    """Return whether an array stands for None. Local."""
    dtype = getattr(array, "dtype", None)
    if dtype is None or not dtype.hasobject:
        return bool(dtype == NONE.dtype)
    return bool(array.ndim == 0 and array[()] is None)


def write_npz(
    path: Path,
    values: Mapping[str, Any],
    digest: hashlib._Hash | None = None,
    *,
    allow_pickle: bool = False,
) -> int:
    """Write a file that ``numpy.load`` reads. Whatever happens, an older file is not lost. Local.

    Not compressed: weights are hardly smaller compressed, and take many times as long.

    Args:
        path: Path of the file.
        values: Arrays by name.
        digest: Hash that is updated with the bytes of the file, or None.
        allow_pickle: Whether there may be arrays of objects other than None.

    Returns:
        The size in bytes.

    Raises:
        PickleRefusedError: If there are, though they must not.
    """
    if not allow_pickle:
        for name, value in values.items():
            if np.asarray(value).dtype.hasobject and not is_none(np.asarray(value)):
                raise PickleRefusedError(
                    f"{name} is an array of objects, which only pickle can store: save numbers, or give "
                    "allow_pickle=True"
                )
    with replacing(path, text=False) as file:
        stream = _Stream(file, digest)
        np.savez(stream, **values)
    return stream.size


class _Stream(io.RawIOBase):
    """A file that is written from beginning to end, as a digest must see it, or up to an error.

    After that zipfile writes on, to close what it has opened: at once, or when NumPy before 2.0 leaves
    that to the collection of garbage, by which time this and the file may be closed.
    """

    def __init__(self, file: IO[Any], digest: hashlib._Hash | None) -> None:
        self._file = file
        self._digest = digest
        self._failed = False
        self.size = 0

    def write(self, data: Any) -> int:
        """Write bytes; after an error, do as if."""
        size = len(data)
        if self._failed or self._file.closed:
            return size
        try:
            self._file.write(data)
        except BaseException:
            self._failed = True
            raise
        if self._digest is not None:
            self._digest.update(data)
        self.size += size
        return size

    def flush(self) -> None:
        """Do nothing: nothing is kept here."""


class ArrayFile(Mapping[str, "Array"]):
    """The arrays of a file that ``numpy.savez`` wrote, each read when it is asked for; None as such an array.

    Args:
        file: File to read from; it stays open.
        allow_pickle: Whether arrays of objects other than None are loaded, which can run any code.
        compressed: Whether there may be compressed arrays. What is not takes no more memory than the
            file has bytes.

    Raises:
        zipfile.BadZipFile: If it is no such file.
    """

    def __init__(
        self, file: BinaryIO, *, allow_pickle: bool = False, compressed: bool = True
    ) -> None:
        self.allow_pickle = allow_pickle
        self._archive = zipfile.ZipFile(file)
        self._members: dict[str, zipfile.ZipInfo] = {}
        for info in self._archive.infolist():
            if not compressed and (
                info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size
            ):
                raise zipfile.BadZipFile(f"{info.filename} is compressed")
            if info.filename.endswith(_NPY):
                self._members[info.filename[: -len(_NPY)]] = info

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, key: object) -> bool:
        return key in self._members

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of an array, without reading more of it than that."""
        with self._archive.open(self._members[key]) as member:
            return _header(member)[0]

    def __getitem__(self, key: str) -> Array:
        info = self._members[key]
        with self._archive.open(info) as member:
            shape, fortran_order, dtype = _header(member)
            if dtype.hasobject:
                return self._objects(key, shape, member.read(_LONGEST_NONE))
            left, size = info.file_size - member.tell(), math.prod(shape) * dtype.itemsize
            if size != left or any(length < 0 for length in shape):
                raise ValueError(f"{key} has {left} bytes, and {shape} {dtype} takes {size}")
            array = np.empty(shape, dtype, order="F" if fortran_order else "C")
            flat: Any = array.reshape(-1, order="A").view(np.uint8) if size else b""
            view, done = memoryview(flat), 0
            while done < array.nbytes:
                count = cast("io.BufferedIOBase", member).readinto(view[done:])
                if not count:
                    raise ValueError(f"{key} ends after {done} bytes of {array.nbytes}")
                done += count
        return NONE_ARRAY if dtype == NONE.dtype else array

    def _objects(self, key: str, shape: tuple[int, ...], pickled: bytes) -> Array:
        if not shape and _spelled(pickled) in _spelled_none():
            return NONE_ARRAY
        if not self.allow_pickle:
            raise PickleRefusedError(
                f"{key} was saved as a pickle, which can run any code when it is loaded; if you trust "
                "whoever wrote the file, allow_pickle=True loads it"
            )
        with self._archive.open(self._members[key]) as member:
            array: Array = np.lib.format.read_array(member, allow_pickle=True)
        return array


NONE_ARRAY = np.asarray(None)
NONE_ARRAY.flags.writeable = False


def _header(member: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read what an array is, up to where its elements begin."""
    version = np.lib.format.read_magic(member)
    if version == (1, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(member)
    elif version == (2, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(member)
    else:
        raise ValueError(f"arrays of format {version} cannot be read")
    return shape, fortran_order, dtype


_MEMO = {
    "PROTO",
    "FRAME",
    "PUT",
    "BINPUT",
    "LONG_BINPUT",
    "MEMOIZE",
    "GET",
    "BINGET",
    "LONG_BINGET",
}


def _spelled(pickled: bytes) -> tuple[Any, ...] | None:
    """Return all that a pickle says, without running it; None if it is none."""
    found: list[Any] = []
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            if opcode.name == "GLOBAL":
                found += str(argument).split(" ")
            elif opcode.name not in (*_MEMO, "STACK_GLOBAL"):
                found.append(opcode.name if argument is None else argument)
    except Exception:  # noqa: BLE001 - it raises many kinds
        return None
    return tuple(
        each.replace("numpy._core", "numpy.core") if isinstance(each, str) else each
        for each in found
    )


def _spelled_none() -> list[Any]:
    """Return what pickles of an array with None say, of all protocols that NumPy has used."""
    return [_spelled(pickle.dumps(NONE_ARRAY, protocol)) for protocol in (2, 3, 4)]


def check_npz(file: Path | BinaryIO) -> None:
    """Raise an error if the file is not the whole of what was written. Local; reads all of it.

    Checksums detect damage within the arrays. A gap between arrays shows that one is missing from the list at
    the end of the file.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(file, Path):
            file = stack.enter_context(open_regular(file))
        archive = stack.enter_context(zipfile.ZipFile(file))
        position = 0
        for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
            _check_follows(info.header_offset, position, info.filename)
            file.seek(info.header_offset)
            header = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
            position = (
                info.header_offset + _LOCAL_HEADER.size + sum(header[-2:]) + info.compress_size
            )
        _check_follows(archive.start_dir, position, "the list of arrays")
        for info in archive.infolist():
            with archive.open(info) as member:  # which compares checksums
                size = 0
                while chunk := member.read(_CHUNK):
                    size += len(chunk)
            if size != info.file_size:
                raise zipfile.BadZipFile(f"{info.filename} has {size} bytes of {info.file_size}")


def _check_follows(begin: int, end_before: int, name: str) -> None:
    # The first member begins the file; a descriptor may stand between two.
    if not end_before <= begin <= end_before + (_LONGEST_DESCRIPTOR if end_before else 0):
        raise zipfile.BadZipFile(f"something is missing before {name}")
