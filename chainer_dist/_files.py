"""Files that are written whole or not at all, and files that are read only if they are plain files."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import stat
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

_LONGEST_NAME = 255 - len(".." + ".tmp") - 16  # bytes, so that the temporary name fits too

_ENDING = re.compile(r"\.[0-9a-f]{16}\.tmp", re.ASCII)


@contextlib.contextmanager
def replacing(path: Path, *, text: bool = True) -> Iterator[IO[Any]]:
    """Open a file for writing that takes its place at the end, once it is on disk. Local.

    Whatever happens, an older file of this name is not lost, and no reader sees the new one unfinished.
    Several writers do not disturb one another: the last to end wins. The new file has the permissions
    of the older one, or else the ones that any new file gets. Temporary files that killed writers of this file
    have left beside it are removed.

    Args:
        path: Path of the new file.
        text: Whether the file takes text, which is written as UTF-8, or bytes.
    """
    path = Path(path)
    if not path.name:  # such as "." or "/"
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    prefix = _prefix(path)
    _remove_leftovers(path.parent, prefix)
    descriptor, temporary = _create(path, prefix)
    try:
        with os.fdopen(
            descriptor, "w" if text else "wb", encoding="utf-8" if text else None
        ) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)  # while the lock still keeps others from removing it
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def open_regular(path: str | os.PathLike[str], *, follow: bool = False) -> BinaryIO:
    """Open a file for reading, if it is a plain file. Local; never waits.

    Args:
        path: Path of the file.
        follow: Whether it may be a symbolic link to one.

    Raises:
        OSError: If it is something else, such as a named pipe, which others could write to, or a link.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP and not follow:
            message = "is a symbolic link, and these are not followed here"
            raise OSError(errno.ELOOP, message, os.fspath(path)) from error
        raise
    return _regular(descriptor, path, "rb")


def open_appending(path: Path) -> BinaryIO:
    """Open a plain file for reading and for writing at its end; made where missing. Local; never waits.

    Raises:
        OSError: If there is something else of that name, such as a symbolic link.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return _regular(os.open(path, flags, 0o666), path, "a+b")


def read_regular(
    path: str | os.PathLike[str], *, limit: int | None = None, follow: bool = False
) -> bytes:
    """Return what is in a plain file. Local.

    Args:
        path: Path of the file.
        limit: Largest number of bytes that the file may have; None is any number.
        follow: Whether it may be a symbolic link.

    Raises:
        ValueError: If it is longer than the limit.
        OSError: If it cannot be read, or is no plain file.
    """
    with open_regular(path, follow=follow) as file:
        content = file.read(-1 if limit is None else limit + 1)
    if limit is not None and len(content) > limit:
        raise ValueError(f"{os.fspath(path)} is longer than {limit} bytes")
    return content


def _regular(descriptor: int, path: str | os.PathLike[str], mode: str) -> BinaryIO:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is not a regular file", os.fspath(path))
    return cast("BinaryIO", os.fdopen(descriptor, mode))


def _prefix(path: Path) -> str:
    """Return how the names of temporary files for a path begin."""
    name = os.fsencode(path.name)
    if len(name) > _LONGEST_NAME:
        return f".{hashlib.sha256(name).hexdigest()}"
    return f".{path.name}"


def _create(path: Path, prefix: str) -> tuple[int, Path]:
    """Create a new file beside a path, and lock it; return its descriptor and its name."""
    permissions = None
    with contextlib.suppress(OSError):
        status = path.lstat()
        if stat.S_ISREG(status.st_mode):
            permissions = stat.S_IMODE(status.st_mode) & 0o777
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        temporary = path.with_name(f"{prefix}.{secrets.token_hex(8)}.tmp")
        descriptor = os.open(temporary, flags, 0o666 if permissions is None else permissions)
        try:
            if permissions is not None:
                os.fchmod(descriptor, permissions)
            with contextlib.suppress(OSError):  # not every file system has locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:
                return descriptor, temporary
        except BaseException:
            os.close(descriptor)
            temporary.unlink(missing_ok=True)
            raise
        os.close(descriptor)  # another writer took it for a leftover before it was locked


def _remove_leftovers(folder: Path, prefix: str) -> None:
    """Remove temporary files of this user that no living process has locked."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        found = [
            Path(entry)
            for entry in entries
            if entry.name.startswith(prefix) and _ENDING.fullmatch(entry.name[len(prefix) :])
        ]
        for path in found:
            with contextlib.suppress(OSError), open_regular(path) as file:
                if os.fstat(file.fileno()).st_uid == os.geteuid():
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
