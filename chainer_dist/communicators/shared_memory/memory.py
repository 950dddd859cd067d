"""Memory that the ranks of a node share for as long as any rank has an array in it.

A shared window of MPI has to be freed by all ranks together, and then arrays that view it are invalid. This
memory has no name while it is used, so nothing of it outlives the ranks, however they end. It is not taken from
``/dev/shm``, which is small in containers.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import mmap
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, cast

import numpy as np

from chainer_dist.collectives.failures import raise_together
from chainer_dist.collectives.operation import collective

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpi4py import MPI

    from chainer_dist._typing import Array
    from chainer_dist.collectives.arrays import ArrayCommunicator

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - mkstemp makes the files private

_TOKEN_BYTES = 16  # written at the beginning for a moment, so that ranks recognize the memory


@collective()
def share_memory(comm: ArrayCommunicator, nbytes: int) -> Array:
    """Return zeroed memory that the ranks of this node share. Collective.

    Args:
        comm: Communicator, each node of which gets memory of its own.
        nbytes: Number of bytes, the same on every rank of a node.

    Returns:
        Writable uint8 array of ``nbytes`` elements. The memory is freed when no rank has a view of it.

    Raises:
        OSError: On every rank, naming the size, if a node has no room.
    """
    size = max(nbytes, _TOKEN_BYTES)
    shared, error = _share(comm.node_comm, size, _create_anonymous)
    if not all(comm.node_comm.allgather(shared is not None)):
        shared, error = _share(comm.node_comm, size, _create_file)
    if error is not None:
        error = OSError(
            f"no room for the {nbytes} bytes that the ranks of a node share: {error}; free some "
            "memory there"
        )
    raise_together(comm, error)
    return np.frombuffer(cast("mmap.mmap", shared), dtype=np.uint8)[:nbytes]


class _ReadOnlyView(np.ndarray[Any, np.dtype[Any]]):
    """A view that cannot be written; see :func:`read_only`. Results of computations with it are ordinary arrays."""

    def copy(self, order: Literal["K", "A", "C", "F"] | None = "C") -> Array:
        """Return an ordinary, writable array with the same values."""
        return np.array(self, order=order)

    def __copy__(self) -> Array:
        return np.array(self)

    def __deepcopy__(self, memo: dict[int, Any] | None) -> Array:
        return np.array(self)

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        # A pickle of protocol 5 would be read-only as well, and might refer to this very memory.
        return np.array(self).__reduce_ex__(protocol)

    def __array_wrap__(self, array: Any, context: Any = None, return_scalar: bool = False) -> Any:
        del context, return_scalar
        return np.asarray(array)[()] if array.ndim == 0 else np.asarray(array)


def read_only(array: Array) -> Array:
    """Return a view that cannot be written, of memory that ranks share. Local.

    Copies and pickles of it are ordinary, writable arrays.
    """
    view = array.view(_ReadOnlyView)
    view.flags.writeable = False
    return view


@functools.cache
def memory_fence() -> Callable[[], None]:
    """Return a function that is a full memory fence between ranks of a node. Local.

    Other ranks see the stores of this rank before the fence once they see one after it, and this rank sees theirs. The
    fence is needed between stores to data and the store to the counter that publishes them, and between the load of a
    counter and loads of the data.
    """
    from mpi4py import MPI

    # MPI has the right fence for any processor. The window belongs to this rank alone, so that it can be freed
    # without the others: MPICH over libfabric aborts in MPI_Finalize if a window is left.
    window = MPI.Win.Allocate_shared(1, comm=MPI.COMM_SELF)
    window.Lock_all(MPI.MODE_NOCHECK)

    def free() -> None:
        if not MPI.Is_finalized():
            window.Unlock_all()
            window.Free()

    atexit.register(free)
    return window.Sync


def default_directories() -> list[Path]:
    """Return the directories for node files, the best one first: shared memory, then temporary files. Local."""
    found = [_SHARED_MEMORY]
    with contextlib.suppress(FileNotFoundError):  # raised if no directory can be written to
        found.append(Path(tempfile.gettempdir()))
    return [each for each in dict.fromkeys(found) if each.is_dir()]


def _share(
    node: MPI.Intracomm, size: int, create: Callable[[int], tuple[int, Path]]
) -> tuple[mmap.mmap | None, OSError | None]:
    """Return the mapping of a file that rank 0 of the node creates, or this rank's error. Collective."""
    created, shared, error = None, None, None
    token = os.urandom(_TOKEN_BYTES)
    try:
        if node.rank == 0:
            created = create(size)
            os.pwrite(created[0], token, 0)
    except OSError as caught:
        error = caught
    path, token = node.bcast((created and created[1], token))
    try:
        if path is not None:
            shared = _map(path, size, token)
    except (OSError, ValueError) as caught:
        error = OSError(str(caught))
    node.Barrier()
    if created is not None:
        os.pwrite(created[0], bytes(_TOKEN_BYTES), 0)
        os.close(created[0])
        if create is _create_file:
            created[1].unlink()
    return shared, error


def _create_anonymous(size: int) -> tuple[int, Path]:
    """Return descriptor and path of a file without a name, which exists on Linux only. Local."""
    if not hasattr(os, "memfd_create"):
        raise OSError("no anonymous files on this system")
    descriptor = os.memfd_create("chainer_dist")
    os.fchmod(descriptor, 0o600)  # only processes of this user may open it
    os.truncate(descriptor, size)
    # Other ranks open it by the descriptor of this process.
    return descriptor, Path(f"/proc/{os.getpid()}/fd/{descriptor}")


def _create_file(size: int) -> tuple[int, Path]:
    """Return descriptor and path of a file in shared memory, or in the directory of temporary files. Local."""
    directory = next(iter(default_directories()), None)
    descriptor, name = tempfile.mkstemp(prefix="chainer_dist-", dir=directory)
    path = Path(name)
    try:
        # Space is reserved now: if it were missing at the first access, that would end the process.
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:
            os.truncate(descriptor, size)
    except OSError:
        os.close(descriptor)
        path.unlink()
        raise
    return descriptor, path


def _map(path: Path, size: int, token: bytes) -> mmap.mmap:
    descriptor = os.open(path, os.O_RDWR)
    try:
        # If ranks are in different containers, the path may belong to another process here.
        if os.pread(descriptor, len(token), 0) != token:
            raise OSError(f"{path} is another file on this rank")
        shared = mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # the kernel may not support huge pages
            shared.madvise(mmap.MADV_HUGEPAGE)
    return shared
