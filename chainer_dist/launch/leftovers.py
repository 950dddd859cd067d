"""Shared memory that processes leave behind when they are killed.

MPI libraries, and Python's semaphores, put files into ``/dev/shm`` and remove them when they end well. Of
a rank that crashed or was killed they stay, in memory, until the next boot.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where the system has it
PROCESSES = Path("/proc")

# Of MPICH and its transport, Open MPI, Intel MPI, and Python's semaphores and shared memory.
_NAMES = (
    "mpich_shm_",
    "ucx_shm_",
    "sm_segment.",
    "vader_segment.",
    "Intel_MPI_",
    "sem.mp-",
    "psm_",
)


def remove_shared_memory(since: float) -> None:
    """Remove files of shared memory that nobody uses any more. Local; on Linux.

    Removed are files of this user that are called as those of MPI and Python are, and that no process maps
    or has open.

    Args:
        since: Only files that were made later, by ``time.time``. Others may have left older ones.
    """
    candidates = dict(_files_of_this_user(since))
    used = _used_files() if candidates else set()
    for path, number in candidates.items():
        if number not in used:
            with contextlib.suppress(OSError):  # other monitors remove them too
                path.unlink()


def _files_of_this_user(since: float) -> Iterator[tuple[Path, int]]:
    """Yield files of shared memory and their inodes: a semaphore has another name where it is mapped."""
    with contextlib.suppress(OSError), os.scandir(SHARED_MEMORY) as entries:
        for entry in entries:
            if entry.name.startswith(_NAMES):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if status.st_uid == os.geteuid() and status.st_ctime >= since:
                        yield Path(entry.path), status.st_ino


def _used_files() -> set[int]:
    """Return the inodes of what processes of this user map or have open, of whatever file system."""
    used = set()
    for process in PROCESSES.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ends meanwhile, or has other rights, and is no rank
            if process.stat().st_uid != os.geteuid():
                continue
            for line in (process / "maps").read_bytes().splitlines():
                used.add(int(line.split(None, 5)[4]))
            for descriptor in (process / "fd").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    used.add(descriptor.stat().st_ino)
    return used
