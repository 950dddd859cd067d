"""Sums over nodes by messages between their ranks: fewer steps than MPI's, fewer bytes, or a slice for each node.

A nonblocking collective would have to be begun in the same order on all ranks, but here one step follows
when another is over. So these are messages between two ranks. Each way is a generator: it yields the
requests that its next step waits for, and no other code changes its arrays until it has ended.
"""

from __future__ import annotations

import functools
import operator
from typing import TYPE_CHECKING, Protocol

import numpy as np

from chainer_dist.collectives import reduction

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mpi4py import MPI

    from chainer_dist._typing import Array

    Requests = Iterator[list[MPI.Request]]

MOST_NODES = 8  # of a direct sum; on more the messages become many and small
_TWO = 2  # nodes, each of which sends everything to the other


class Codec(Protocol):
    """How numbers are sent: each of them by itself, in so many bytes.

    Attributes:
        sent: Number of bytes that were given to MPI to send to other nodes; the sender adds to it.
    """

    sent: int

    def encode(self, values: Array) -> Array:
        """Return float32 values of shape ``(rows, n)`` as bytes, ``(rows, m)`` uint8. Local."""

    def decode(self, code: Array) -> Array:
        """Return the values that :meth:`encode` encoded, as new float32 of shape ``(rows, n)``. Local."""


class Steps:
    """A generator of requests, gone on with whenever those that it has yielded are done. Local.

    Args:
        requests: The generator; its first step is made at once.
    """

    def __init__(self, requests: Requests) -> None:
        from mpi4py import MPI

        self._are_done = MPI.Request.Testall  # importing MPI takes as long as a call
        self._steps = requests
        self._requests = next(requests, None)

    def test(self) -> bool:
        """Do all that can be done without waiting; return whether that was the end."""
        while self._requests is not None and self._are_done(self._requests):
            self._requests = next(self._steps, None)
        return self._requests is None


class Peers:
    """The ranks of equal number on all nodes, one for each node.

    Args:
        mpi_comm: Communicator of these ranks only, in the order of the nodes.

    Attributes:
        by_mpi: Whether plain sums are MPI's, because there are many nodes.
    """

    def __init__(self, mpi_comm: MPI.Intracomm) -> None:
        self.mpi_comm = mpi_comm
        self.rank, self.size = mpi_comm.rank, mpi_comm.size
        self.by_mpi = self.size > MOST_NODES
        self._others = [rank for rank in range(self.size) if rank != self.rank]

    def post(
        self, sent: Sequence[Array], received: Sequence[Array], tag: int, codec: Codec | None = None
    ) -> list[MPI.Request]:
        """Begin to send to, and to receive from, each of the others. Local.

        Args:
            sent: One array for each rank.
            received: One array for each rank.
            tag: Tag of the messages, which no others have meanwhile.
            codec: Counts the bytes that are sent; None if they are not counted.
        """
        comm, others = self.mpi_comm, self._others
        requests = [comm.Irecv(received[rank], rank, tag) for rank in others]
        requests += [comm.Isend(sent[rank], rank, tag) for rank in others]
        if codec is not None:
            codec.sent += sum(sent[rank].nbytes for rank in others)
        return requests

    def ask_all(self, flag: Array) -> Requests:
        """Find out whether a flag is true on any of the ranks. Collective, begun in the same order as others.

        Args:
            flag: One bool; it becomes the answer.
        """
        from mpi4py import MPI

        yield [self.mpi_comm.Iallreduce(MPI.IN_PLACE, flag, MPI.LOR)]


def mpi_sum(peers: Peers, total: Array) -> Requests:
    """Sum an array over nodes by MPI's allreduce. Collective, begun in the same order as others.

    Args:
        peers: The ranks that have the array.
        total: 1-dimensional, C-contiguous, not empty; it becomes the sum.
    """
    yield [reduction.begin_sum(peers.mpi_comm, total)]


def _equal_slices(size: int, nodes: int) -> list[slice]:
    """Return which of so many elements each node sums up."""
    edges = [size * node // nodes for node in range(nodes + 1)]
    return [slice(*edge) for edge in zip(edges, edges[1:])]


def direct_sum(peers: Peers, own: Array, total: Array, *, tag: int) -> Requests:
    """Sum an array over a few nodes. Collective.

    Two nodes send each other everything. Of more, each sums up a slice and sends that to the others. So
    there are two steps at most, where an allreduce of MPI has two for each doubling of the nodes; and
    each step waits until MPI is called, which during backward is seldom. Sums are in the order of the
    nodes.

    Args:
        peers: The ranks that have the array.
        own: The summand of this rank: 1-dimensional, C-contiguous, not empty. It is only read.
        total: Array of the same size and dtype that takes the sum; it may be ``own``, but not overlap it
            otherwise.
        tag: Tag of the messages, and the next number; used by no others meanwhile.
    """
    nodes = peers.size
    if nodes == _TWO:
        received = np.empty_like(own) if own is total else total
        yield peers.post([own] * nodes, [received] * nodes, tag)
        np.add(own, received, out=total)
        return
    slices = _equal_slices(own.size, nodes)
    mine = own[slices[peers.rank]]
    summands = list(np.empty((nodes, mine.size), own.dtype))
    summands[peers.rank] = mine
    yield peers.post([own[each] for each in slices], summands, tag)
    mine = total[slices[peers.rank]]
    mine[...] = functools.reduce(operator.iadd, summands[1:], summands[0].copy())
    yield peers.post([mine] * nodes, [total[each] for each in slices], tag + 1)


class _Wire:
    """How the numbers of an array are sent: by a codec, or as they are.

    Args:
        codec: The codec, or None.
        total: The array, not empty.

    Attributes:
        code: The array as bytes, one row for each number.
    """

    def __init__(self, codec: Codec | None, total: Array) -> None:
        self._codec, self._dtype = codec, total.dtype
        code = self._encode(total)
        self._width = code.size // total.size
        self.code = code.reshape(-1, self._width)

    def encode(self, values: Array) -> Array:
        """Return values as bytes, one row for each number."""
        return self._encode(values).reshape(-1, self._width)

    def _encode(self, values: Array) -> Array:
        if self._codec is None:
            return values.view(np.uint8)
        return self._codec.encode(values.astype(np.float32, copy=False)[np.newaxis])

    def decode(self, code: Array) -> Array:
        """Return a new array of the values of some rows."""
        values: Array
        if self._codec is None:
            values = code.reshape(-1).view(self._dtype).copy()
        else:
            values = self._codec.decode(code.reshape(1, -1))[0]
        return values

    def add_up(self, received: Array) -> Array:
        """Return the sum of what was received of each rank, in the order of the nodes."""
        first, *others = received
        total = self.decode(first)
        for each in others:
            total += self.decode(each)
        return total


def _scatter(
    peers: Peers, code: Array, slices: Sequence[slice], tag: int, codec: Codec | None
) -> tuple[Array, list[MPI.Request]]:
    """Begin to send each slice of an encoded array to its rank; return where its own come to, one row a node."""
    own = code[slices[peers.rank]]
    received = np.empty((peers.size, *own.shape), np.uint8)
    received[peers.rank] = own  # it is decoded here, too, as everywhere
    return received, peers.post([code[each] for each in slices], list(received), tag, codec)


def coded_mean(peers: Peers, total: Array, *, scale: float, codec: Codec, tag: int) -> Requests:
    """Average an array over nodes by the numbers of a codec. Collective.

    Every rank decodes what it has sent itself as well, so that all of them come to the same bits. Two
    nodes send each other everything, and each number is rounded once; on the way between more of
    them, where each sums up a slice for the others, a second time. Sums are in the order of the nodes.

    Args:
        peers: The ranks that have the array.
        total: 1-dimensional, not empty, float32 or float64. It becomes the mean.
        scale: Factor that makes the sum over ``peers`` a mean.
        codec: How numbers are sent.
        tag: Tag of the messages, and the next number; used by no others meanwhile.
    """
    nodes = peers.size
    is_whole = nodes == _TWO
    slices = [slice(0, total.size)] * nodes if is_whole else _equal_slices(total.size, nodes)
    np.multiply(total, scale, out=total)
    wire = _Wire(codec, total)
    received, requests = _scatter(peers, wire.code, slices, tag, codec)
    yield requests
    if is_whole:
        total[...] = wire.add_up(received)
        return
    mine = wire.encode(wire.add_up(received))
    means = np.empty_like(wire.code)
    means[slices[peers.rank]] = mine
    yield peers.post([mine] * nodes, [means[each] for each in slices], tag + 1, codec)
    total[...] = wire.decode(means)


def slice_of_each(
    peers: Peers,
    total: Array,
    slices: Sequence[slice],
    work: Callable[[], None],
    *,
    sums: bool,
    returns: bool,
    scale: float,
    codec: Codec | None,
    tag: int,
) -> Requests:
    """Sum an array over nodes, a slice for each node, which gives what it makes of that to the others. Collective.

    Args:
        peers: The ranks that have the array.
        total: 1-dimensional, not empty. Its own slice becomes the sum, in the order of the nodes; with
            a codec the mean. Then ``work`` makes of it what the others get.
        slices: Slices of ``total``, one for each node.
        work: Called when the sum is there.
        sums: Whether there is anything to sum.
        returns: Whether the others get what was made.
        scale: Factor that makes the sum over ``peers`` a mean.
        codec: How numbers are sent to the rank that sums them up; None as they are.
        tag: Tag of the messages, and the next number; used by no others meanwhile.
    """
    own = slices[peers.rank]
    if sums:
        if codec is not None:
            np.multiply(total, scale, out=total)
        wire = _Wire(codec, total)
        received, requests = _scatter(peers, wire.code, slices, tag, codec)
        yield requests
        total[own] = wire.add_up(received)
    else:
        yield []
    work()
    if returns:
        mine = total[own]
        yield peers.post([mine] * peers.size, [total[each] for each in slices], tag + 1)
