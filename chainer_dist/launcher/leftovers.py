"""Shared memory that processes leave behind when they are killed.

MPI libraries, and Python's semaphores, put files into ``/dev/shm`` and remove them when they end well. Of
a rank that crashed or was killed they stay, in memory, until the next boot.

Which of them are in use only the kernel knows: containers may share ``/dev/shm`` and not see one another's
processes. It grants a lease on a file, to the owner, as long as no process anywhere maps it or has it open.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import stat
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where the system has it

# Of MPICH and its transport, Open MPI, Intel MPI, Python's semaphores and shared memory, and chainer_dist.
_NAMES = (
    "mpich_shm_",
    "mpich_shar_tmp",
    "ucx_shm_",
    "sm_segment.",
    "vader_segment.",
    "Intel_MPI_",
    "sem.mp-",
    "psm_",
    "chainer_dist-",
)


def remove_shared_memory(since: float) -> None:
    """Remove files of shared memory that no process uses any more. Local; on Linux.

    These are files of this user, with names that MPI and Python give, that no process maps or has open, in
    this container or another one. Where the kernel does not know that, none are removed.

    Args:
        since: Time by ``time.time``, in seconds. Older files are kept, as they may belong to other jobs.
    """
    if not hasattr(fcntl, "F_SETLEASE"):
        return
    # The kernel sends this signal, which kills, to the holder of a lease when another process opens the file.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGIO])
    try:
        for path in list(_files_of_this_user(since)):
            with contextlib.suppress(OSError):  # other monitors remove them too
                _remove_unless_used(path)
        while signal.sigtimedwait([signal.SIGIO], 0):
            pass
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _files_of_this_user(since: float) -> Iterator[Path]:
    with contextlib.suppress(OSError), os.scandir(SHARED_MEMORY) as entries:
        for entry in entries:
            if entry.name.startswith(_NAMES):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    is_ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
                    if is_ours and status.st_ctime >= since:
                        yield Path(entry.path)


def _remove_unless_used(path: Path) -> None:
    """Remove a file.

    Raises:
        OSError: If a process uses it, or the kernel does not know.
    """
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        opened, named = os.fstat(file), path.lstat()
        if (opened.st_dev, opened.st_ino) == (named.st_dev, named.st_ino):
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            path.unlink()
    finally:
        os.close(file)  # which gives the lease back
