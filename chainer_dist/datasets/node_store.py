"""The parts of all ranks of a node in one file that they share, and a rank's own part mapped from it."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from chainer_dist.datasets.node_file import NodeFile
from chainer_dist.datasets.pickled_parts import Common, PartUnpickler

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from chainer_dist.datasets.pickled_parts import Pickled

__all__ = ["CHUNK_BYTES", "Header", "OpenedShare", "Share", "Store", "chunks_of"]


_ALIGNMENT = 64  # bytes: a cache line, and as much as any vector instruction wants
# Buffers from _DIRECT_BYTES on are sent from where they lie, smaller ones are collected first.
_DIRECT_BYTES = 64 << 10
_STAGING_BYTES = 1 << 20
CHUNK_BYTES = 16 << 20  # of a message between nodes at most

_Sizes = np.ndarray[Any, np.dtype[np.int64]]


class Header(NamedTuple):
    """The description of a pickle, which is sent before its bytes.

    Attributes:
        rank: Rank whose part it is; None for a common object.
        number: Number of the common object.
        sizes: Bytes of each piece, int64, of shape ``(pieces,)``; the pickle first, then its arrays.
        readonly: For each piece whether it came from a read-only array.
        commons: Numbers of the common objects that it refers to.
    """

    rank: int | None
    number: int
    sizes: _Sizes
    readonly: list[bool]
    commons: list[int]

    @classmethod
    def of(cls, pickled: Pickled, *, rank: int | None = None, number: int = 0) -> Header:
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
    header: Header


class Share(NamedTuple):
    """The places in the node's file that one rank reads."""

    path: Path
    part: _Entry
    commons: dict[int, _Entry]


class Store:
    """The node's file with the parts of its ranks, as the rank has it that writes it."""

    def __init__(self, directories: Sequence[Path]) -> None:
        self.file = NodeFile(directories)
        self._parts: dict[int, _Entry] = {}
        self._commons: dict[int, _Entry] = {}

    def begin(self, header: Header) -> None:
        """Note that the bytes appended next belong to ``header``."""
        entry = _Entry(self.file.position, header)
        if header.rank is None:
            self._commons[header.number] = entry
        else:
            self._parts[header.rank] = entry

    def put(self, header: Header, pieces: Sequence[memoryview]) -> None:
        """Store one pickle."""
        self.begin(header)
        for chunk in chunks_of(pieces):
            self.file.append(chunk)

    def shares(self, ranks: Sequence[int]) -> list[Share]:
        """Return for each rank what it needs to read its part."""
        return [
            Share(
                self.file.path,
                self._parts[rank],
                {number: self._commons[number] for number in self._parts[rank].header.commons},
            )
            for rank in ranks
        ]


class OpenedShare:
    """A rank's share, mapped into its memory; from then on the file needs no name."""

    def __init__(self, share: Share) -> None:
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
        return PartUnpickler(self._file, buffers, commons).load()

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


def chunks_of(pieces: Sequence[memoryview]) -> Iterator[memoryview]:
    """Yield the bytes of all pieces, each padded, in chunks to be used before the next is asked for."""
    staging = memoryview(bytearray(_STAGING_BYTES))
    filled = 0
    for piece in pieces:
        if filled + piece.nbytes + _ALIGNMENT > _STAGING_BYTES or piece.nbytes >= _DIRECT_BYTES:
            if filled:
                yield staging[:filled]
            filled = 0
        if piece.nbytes >= _DIRECT_BYTES:
            for start in range(0, piece.nbytes, CHUNK_BYTES):
                yield piece[start : start + CHUNK_BYTES]
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
