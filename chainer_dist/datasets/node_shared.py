"""Sending each rank its part of something, through memory that the ranks of a node share.

The root makes one part at a time and pickles it; arrays stay out of the pickle (protocol 5) and
travel as the bytes that they are. On the root's own node the root writes those bytes into a file
in shared memory; on every other node the lowest rank does, as they arrive. Then each rank maps its
part of the file copy-on-write: its arrays are the shared bytes themselves, and writing to one
gives that rank a private copy of the page, unseen by the others. The file loses its name as soon
as it is mapped, so that nothing is left behind, however the ranks end.
"""

from __future__ import annotations

import io
import mmap
import pickle
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from chainer_dist.collectives.failures import together
from chainer_dist.collectives.operation import collective
from chainer_dist.communicators.shared_memory.memory import default_directories
from chainer_dist.datasets.node_file import NodeFile

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from mpi4py import MPI

    from chainer_dist.communicators import CommunicatorBase

_TAG = 5005

_ALIGNMENT = 64  # bytes: a cache line, and as much as any vector instruction wants

# A smaller array is not worth a place of its own; it is copied within the pickle.
_OUT_OF_BAND_BYTES = 4096

# Buffers from _DIRECT_BYTES on are sent from where they lie, smaller ones are collected first.
_DIRECT_BYTES = 64 << 10
_STAGING_BYTES = 1 << 20
_CHUNK_BYTES = 16 << 20

_Sizes = np.ndarray[Any, np.dtype[np.int64]]


class Common:
    """Something that several parts hold in full: sent and stored once a node.

    Args:
        value: Any picklable object.
    """

    def __init__(self, value: Any) -> None:
        self.value = value


class _Pickled(NamedTuple):
    """A pickle and the buffers that were left out of it, as contiguous bytes."""

    pieces: list[memoryview]  # the pickle first
    commons: list[int]  # numbers of the common objects that it refers to


class _Header(NamedTuple):
    """What a node is told before the bytes of a pickle arrive."""

    rank: int | None  # whose part it is; None for a common object
    number: int  # of the common object
    sizes: _Sizes  # bytes of each piece
    readonly: list[bool]  # whether a piece came from a read-only array
    commons: list[int]

    @classmethod
    def of(cls, pickled: _Pickled, *, rank: int | None = None, number: int = 0) -> _Header:
        """Describe a pickle."""
        return cls(
            rank,
            number,
            np.array([piece.nbytes for piece in pickled.pieces], dtype=np.int64),
            [piece.readonly for piece in pickled.pieces],
            pickled.commons,
        )

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return int(_padded(self.sizes).sum())


class _Entry(NamedTuple):
    """A pickle in the node's file."""

    offset: int
    header: _Header


class _Share(NamedTuple):
    """What one rank needs to read its part."""

    path: Path
    part: _Entry
    commons: dict[int, _Entry]


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
            object in a :class:`Common` is sent and stored once a node.
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
                store = _Store(default_directories() if directories is None else directories)
                if comm.rank == root:
                    _serve(comm.mpi_comm, writers, make_part, store)
                    complete = True
                else:
                    complete = _receive(comm.mpi_comm, root, store)
                shares = store.shares(members) if complete else None
        share = node.scatter(shares, root=members.index(writer))
        with together(comm):
            opened = _Opened(share)
    finally:
        if store is not None:
            store.file.unlink()
    with together(comm):
        part = opened.load()
    return part  # noqa: RET504 - not before all ranks have theirs


class _Store:
    """What the ranks of one node get, in the node's file. Held by the rank that writes it."""

    def __init__(self, directories: Sequence[Path]) -> None:
        self.file = NodeFile(directories)
        self._parts: dict[int, _Entry] = {}
        self._commons: dict[int, _Entry] = {}

    def begin(self, header: _Header) -> None:
        """Note that the bytes appended next are those of ``header``."""
        entry = _Entry(self.file.position, header)
        if header.rank is None:
            self._commons[header.number] = entry
        else:
            self._parts[header.rank] = entry

    def put(self, header: _Header, pieces: Sequence[memoryview]) -> None:
        """Store one pickle."""
        self.begin(header)
        for chunk in _chunks(pieces):
            self.file.append(chunk)

    def shares(self, ranks: Sequence[int]) -> list[_Share]:
        """Return for each rank what it needs to read its part."""
        return [
            _Share(
                self.file.path,
                self._parts[rank],
                {number: self._commons[number] for number in self._parts[rank].header.commons},
            )
            for rank in ranks
        ]


class _RemoteStore:
    """The store of another node, as the root sees it: what it puts there, :func:`_receive` gets."""

    def __init__(self, mpi_comm: MPI.Intracomm, writer: int) -> None:
        self._mpi_comm = mpi_comm
        self._writer = writer

    def put(self, header: _Header, pieces: Sequence[memoryview]) -> None:
        """Send one pickle."""
        from mpi4py import MPI

        self._mpi_comm.send(header, self._writer, _TAG)
        for chunk in _chunks(pieces):
            self._mpi_comm.Send([chunk, MPI.BYTE], self._writer, _TAG)

    def end(self, *, complete: bool) -> None:
        """Tell that nothing more comes, and whether that was all."""
        self._mpi_comm.send(complete, self._writer, _TAG)


def _serve(
    mpi_comm: MPI.Intracomm,
    writers: Sequence[int],
    make_part: Callable[[int], Any],
    own: _Store,
) -> None:
    """Make all parts, node by node, and store them on the nodes. On the root."""
    remote = {
        writer: _RemoteStore(mpi_comm, writer) for writer in sorted({*writers} - {mpi_comm.rank})
    }
    stores: dict[int, _Store | _RemoteStore] = {**remote, mpi_comm.rank: own}
    table = _Commons()
    complete = False
    try:
        for writer, store in stores.items():
            known: set[int] = set()
            for rank in [rank for rank, its_writer in enumerate(writers) if its_writer == writer]:
                part = _dump(make_part(rank), rank, table)
                for number in sorted({*part.commons} - known):
                    common = table.pickled[number]
                    store.put(_Header.of(common, number=number), common.pieces)
                known.update(part.commons)
                store.put(_Header.of(part, rank=rank), part.pieces)
                del part  # before the next is made
        complete = True
    finally:
        for each in remote.values():
            each.end(complete=complete)


def _receive(mpi_comm: MPI.Intracomm, root: int, store: _Store) -> bool:
    """Write what the root sends into the node's file. On the writer of another node.

    Returns:
        Whether that was all; otherwise the root has failed.
    """
    from mpi4py import MPI

    buffer = memoryview(bytearray(_CHUNK_BYTES))
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


def _chunks(pieces: Sequence[memoryview]) -> Iterator[memoryview]:
    """Yield the bytes of all pieces, each padded, in chunks to be used before the next is asked for."""
    staging = memoryview(bytearray(_STAGING_BYTES))
    filled = 0
    for piece in pieces:
        if filled + piece.nbytes + _ALIGNMENT > _STAGING_BYTES or piece.nbytes >= _DIRECT_BYTES:
            if filled:
                yield staging[:filled]
            filled = 0
        if piece.nbytes >= _DIRECT_BYTES:
            for start in range(0, piece.nbytes, _CHUNK_BYTES):
                yield piece[start : start + _CHUNK_BYTES]
        else:
            staging[filled : filled + piece.nbytes] = piece
            filled += piece.nbytes
        padding = -piece.nbytes % _ALIGNMENT
        staging[filled : filled + padding] = bytes(padding)
        filled += padding
    if filled:
        yield staging[:filled]


def _padded(sizes: _Sizes) -> _Sizes:
    return sizes + -sizes % _ALIGNMENT


class _Commons:
    """Common objects in the order in which the root meets them. Each is pickled once."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self._values: list[Any] = []  # keeps their ids from being given to other objects
        self.pickled: list[_Pickled] = []

    def number(self, common: Common) -> int:
        """Return the number of a common object, pickling it if it is new."""
        value = common.value
        if id(value) not in self._numbers:
            # What is common within a common object is pickled as a part of it.
            pickled = _dump_with(
                lambda file, callback: pickle.Pickler(file, protocol=5, buffer_callback=callback),
                value,
            )
            self._numbers[id(value)] = len(self._values)
            self._values.append(value)
            self.pickled.append(_Pickled(pickled, []))
        return self._numbers[id(value)]


class _PartPickler(pickle.Pickler):
    """Pickles a part; common objects become numbers."""

    def __init__(self, file: io.BytesIO, callback: Callable[[Any], Any], table: _Commons) -> None:
        super().__init__(file, protocol=5, buffer_callback=callback)
        self._table = table
        self.met: list[int] = []

    def persistent_id(self, obj: Any) -> int | None:
        """Return the number of a common object, None for anything else."""
        if type(obj) is not Common:
            return None
        number = self._table.number(obj)
        if number not in self.met:
            self.met.append(number)
        return number


class _PartUnpickler(pickle.Unpickler):
    """Reads what :class:`_PartPickler` wrote."""

    def __init__(self, file: Any, buffers: list[memoryview], commons: dict[int, Common]) -> None:
        super().__init__(file, buffers=buffers)
        self._commons = commons

    def persistent_load(self, pid: int) -> Common:
        """Return the common object of that number."""
        return self._commons[pid]


class _Opened:
    """A rank's share, mapped into its memory; the file needs no name any more."""

    def __init__(self, share: _Share) -> None:
        self._share = share
        self._file = share.path.open("rb")
        self._part_buffers = self._map(share.part)
        self._common_buffers = {number: self._map(entry) for number, entry in share.commons.items()}

    def load(self) -> Any:
        """Unpickle the part."""
        with self._file:
            commons = {
                number: Common(self._load(entry, self._common_buffers[number], {}))
                for number, entry in self._share.commons.items()
            }
            return self._load(self._share.part, self._part_buffers, commons)

    def _load(self, entry: _Entry, buffers: list[memoryview], commons: dict[int, Common]) -> Any:
        self._file.seek(entry.offset)
        return _PartUnpickler(self._file, buffers, commons).load()

    def _map(self, entry: _Entry) -> list[memoryview]:
        """Map the buffers of a pickle, and nothing else of the file, copy-on-write."""
        sizes = entry.header.sizes
        if len(sizes) == 1:
            return []
        begins = entry.offset + np.cumsum(_padded(sizes)) - _padded(sizes)
        start = int(begins[1]) // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        stop = int(begins[-1] + sizes[-1])
        memory = memoryview(
            mmap.mmap(self._file.fileno(), stop - start, access=mmap.ACCESS_COPY, offset=start)
        )
        views = [
            memory[begin : begin + size]
            for begin, size in zip((begins[1:] - start).tolist(), sizes[1:].tolist())
        ]
        return [
            view.toreadonly() if readonly else view
            for view, readonly in zip(views, entry.header.readonly[1:])
        ]


def _dump(part: Any, rank: int, table: _Commons) -> _Pickled:
    picklers: list[_PartPickler] = []

    def make(file: io.BytesIO, callback: Callable[[Any], Any]) -> pickle.Pickler:
        picklers.append(_PartPickler(file, callback, table))
        return picklers[0]

    try:
        pieces = _dump_with(make, part)
    except Exception as error:
        raise pickle.PicklingError(
            f"the part of rank {rank} cannot be pickled: {type(error).__name__}: {error}. "
            "Everything in a dataset must be something other processes can have: for example, a "
            "transform must be a function of an importable module, not a lambda, and a file must "
            "be opened where it is read"
        ) from error
    return _Pickled(pieces, picklers[0].met)


def _dump_with(
    make_pickler: Callable[[io.BytesIO, Callable[[Any], Any]], pickle.Pickler], value: Any
) -> list[memoryview]:
    """Pickle ``value``; return the pickle and the buffers left out of it."""
    buffers: list[memoryview] = []

    def keep_in_band(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < _OUT_OF_BAND_BYTES:
            return True
        buffers.append(raw)
        return False

    file = io.BytesIO()
    make_pickler(file, keep_in_band).dump(value)
    return [file.getbuffer(), *buffers]
