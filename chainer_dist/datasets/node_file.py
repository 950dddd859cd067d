"""One file in memory that the ranks of a node share."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

# MPI keeps segments of its own in /dev/shm: what is left of a small one must do for them.
_LEFT_FREE_AT_MOST = 1 << 30  # bytes
_LEFT_FREE_SHARE = 8

_COPY_BYTES = 16 << 20


class NodeFile:
    """A file that one rank of a node writes and all of them map. Local.

    It starts in the first directory and moves on to the next where there is no room. It is
    written, never stored to through a mapping, so that too little room is an error here and not a
    fatal SIGBUS in some rank. Once no directory is left it keeps counting what it would need.

    Args:
        directories: Directories in which the file may be, best first.
    """

    def __init__(self, directories: Sequence[Path]) -> None:
        self._untried = list(directories)
        self._refusals: list[str] = []
        self._descriptor: int | None = None
        self._path: Path | None = None
        self._written = 0
        self._needed = 0
        self._move()

    @property
    def path(self) -> Path:
        """Where the file is.

        Raises:
            OSError: If the bytes appended so far found no room in any of the directories.
        """
        if self._path is None:
            raise OSError(
                f"no room for {self._needed} bytes of the scattered dataset on this node; tried "
                f"{'; '.join(self._refusals) or 'no directory'}. Free some memory there, or set "
                "TMPDIR to a directory with more"
            )
        return self._path

    @property
    def position(self) -> int:
        """Bytes appended so far."""
        return self._needed

    def append(self, data: memoryview) -> None:
        """Write bytes at the end.

        Args:
            data: Contiguous bytes of format ``B``.
        """
        self._needed += data.nbytes
        while data.nbytes and self._descriptor is not None:
            try:
                self._check_room(self._descriptor, data.nbytes)
                written = os.write(self._descriptor, data)
            except OSError as error:  # noqa: PERF203 - how a directory says no
                self._refuse(error)
                self._move()
            else:
                self._written += written
                data = data[written:]

    def unlink(self) -> None:
        """Close the file and take its name away; the memory stays while ranks have it mapped."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        if self._path is not None:
            self._path.unlink()
            self._path = None

    def _move(self) -> None:
        """Go on in the next directory that takes what is written already."""
        old, source = self._descriptor, self._path
        self._descriptor = self._path = None
        while self._untried and self._descriptor is None:
            try:
                self._descriptor, name = tempfile.mkstemp(
                    prefix="chainer_dist-", dir=self._untried[0]
                )
                self._path = Path(name)
                if old is not None:
                    self._copy(old, self._descriptor)
            except OSError as error:  # noqa: PERF203 - how a directory says no
                self._refuse(error)
                self.unlink()
        if old is not None and source is not None:
            os.close(old)
            source.unlink()

    def _copy(self, old: int, new: int) -> None:
        copied = 0
        while copied < self._written:
            chunk = memoryview(os.pread(old, min(_COPY_BYTES, self._written - copied), copied))
            copied += chunk.nbytes
            while chunk.nbytes:
                self._check_room(new, chunk.nbytes)
                chunk = chunk[os.write(new, chunk) :]

    def _refuse(self, error: OSError) -> None:
        self._refusals.append(f"{self._untried.pop(0)}: {error.strerror or error}")

    def _check_room(self, descriptor: int, nbytes: int) -> None:
        """Raise where writing would take the room that others need, if there is a next directory."""
        if len(self._untried) == 1:
            return
        state = os.fstatvfs(descriptor)
        total, free = state.f_blocks * state.f_frsize, state.f_bavail * state.f_frsize
        reserve = min(total // _LEFT_FREE_SHARE, _LEFT_FREE_AT_MOST)
        if total and free - nbytes < reserve:
            raise OSError(f"{free} bytes free, of which {reserve} are left to MPI")
