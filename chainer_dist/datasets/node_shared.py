"""Sending each rank its part of something, through memory that the ranks of a node share.

The root makes one part at a time and pickles it; arrays stay out of the pickle (protocol 5) and
travel as the bytes that they are. On the root's own node the root writes those bytes into a file
in shared memory; on every other node the lowest rank does, as they arrive. Then each rank maps its
part of the file copy-on-write: its arrays are the shared bytes themselves, and writing to one
gives that rank a private copy of the page, unseen by the others. The file loses its name as soon
as it is mapped, so that nothing is left behind, however the ranks end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chainer_dist.collectives.failures import together
from chainer_dist.collectives.operation import collective
from chainer_dist.communicators.shared_memory.memory import default_directories
from chainer_dist.datasets.node_store import CHUNK_BYTES, Header, OpenedShare, Store, chunks_of
from chainer_dist.datasets.pickled_parts import CommonObjects, pickle_part

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from mpi4py import MPI

    from chainer_dist.communicators import CommunicatorBase

_TAG = 5005


@collective(name="scatter of data")
def scatter_parts(
    comm: CommunicatorBase,
    root: int,
    make_part: Callable[[int], Any],
    *,
    node_comm: MPI.Intracomm | None = None,
    directories: Sequence[Path] | None = None,
) -> Any:
    """Give each rank the part that the root makes for it. Collective.

    The root holds one part beyond what ``make_part`` itself keeps, whatever their number.

    Args:
        comm: Communicator.
        root: Rank that makes the parts, the same on every rank.
        make_part: Called on the root only, with each rank once; returns any picklable object. An
            object in a :class:`~chainer_dist.datasets.pickled_parts.Common` is sent and stored once a node.
        node_comm: The ranks that share memory with this one, ``comm.node_comm`` by default.
        directories: Where the node's file may be, best first: by default ``/dev/shm`` and the
            directory for temporary files.

    Returns:
        This rank's part. Its arrays are writable where the root's were; their memory is the
        node's file.

    Raises:
        OSError: On every rank, if a node has no room for its ranks' parts.
        Exception: On every rank, what making, pickling or unpickling a part raised on one.
    """
    node = comm.node_comm if node_comm is None else node_comm
    members = node.allgather(comm.rank)
    writer = root if root in members else min(members)
    writers = comm.mpi_comm.allgather(writer)

    store = shares = None
    try:
        with together(comm):
            if comm.rank == writer:
                store = Store(default_directories() if directories is None else directories)
                if comm.rank == root:
                    _serve(comm.mpi_comm, writers, make_part, store)
                    complete = True
                else:
                    complete = _receive(comm.mpi_comm, root, store)
                shares = store.shares(members) if complete else None
        share = node.scatter(shares, root=members.index(writer))
        with together(comm):
            opened = OpenedShare(share)
    finally:
        if store is not None:
            store.file.unlink()
    with together(comm):
        part = opened.load()
    return part  # noqa: RET504 - not before all ranks have theirs


class _RemoteStore:
    """The store of another node, as the root sees it: what it puts there, :func:`_receive` gets."""

    def __init__(self, mpi_comm: MPI.Intracomm, writer: int) -> None:
        self._mpi_comm = mpi_comm
        self._writer = writer

    def put(self, header: Header, pieces: Sequence[memoryview]) -> None:
        """Send one pickle."""
        from mpi4py import MPI

        self._mpi_comm.send(header, self._writer, _TAG)
        for chunk in chunks_of(pieces):
            self._mpi_comm.Send([chunk, MPI.BYTE], self._writer, _TAG)

    def end(self, *, complete: bool) -> None:
        """Send that nothing more comes, and whether that was all. Local."""
        self._mpi_comm.send(complete, self._writer, _TAG)


def _serve(
    mpi_comm: MPI.Intracomm,
    writers: Sequence[int],
    make_part: Callable[[int], Any],
    own: Store,
) -> None:
    """Make all parts, node by node, and store them on the nodes. On the root."""
    remote = {
        writer: _RemoteStore(mpi_comm, writer) for writer in sorted({*writers} - {mpi_comm.rank})
    }
    stores: dict[int, Store | _RemoteStore] = {**remote, mpi_comm.rank: own}
    table = CommonObjects()
    complete = False
    try:
        for writer, store in stores.items():
            known: set[int] = set()
            for rank in [rank for rank, its_writer in enumerate(writers) if its_writer == writer]:
                part = pickle_part(make_part(rank), rank, table)
                for number in sorted({*part.commons} - known):
                    common = table.pickled[number]
                    store.put(Header.of(common, number=number), common.pieces)
                known.update(part.commons)
                store.put(Header.of(part, rank=rank), part.pieces)
                del part  # before the next is made
        complete = True
    finally:
        for each in remote.values():
            each.end(complete=complete)


def _receive(mpi_comm: MPI.Intracomm, root: int, store: Store) -> bool:
    """Write what the root sends into the node's file. On the writer of another node.

    Returns:
        Whether that was all; otherwise the root has failed.
    """
    from mpi4py import MPI

    buffer = memoryview(bytearray(CHUNK_BYTES))
    status = MPI.Status()
    while True:
        header = mpi_comm.recv(None, root, _TAG)
        if isinstance(header, bool):
            return header
        store.begin(header)
        missing = header.nbytes
        while missing:
            mpi_comm.Recv([buffer, MPI.BYTE], root, _TAG, status)
            received = status.Get_count(MPI.BYTE)
            # Where there is no room this only counts: the root has to be listened to the end.
            store.file.append(buffer[:received])
            missing -= received
