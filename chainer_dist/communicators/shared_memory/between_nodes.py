"""Sums over nodes, by messages between two ranks: with fewer steps than MPI's, fewer bytes, or a slice per node.

Nonblocking collectives must begin in the same order on all ranks, while a step here begins whenever the step
before it is done, so that messages between two ranks are needed. Each kind of sum is a generator. It yields the
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

MOST_NODES = 8  # most nodes of a direct sum; with more nodes, messages become many and small
_TWO = 2  # number of nodes with which each sends everything to the other


class Codec(Protocol):
    """A code for single numbers, each of which has the same number of bytes.

    Attributes:
        sent: Number of bytes that were given to MPI to send to other nodes; the sender adds to it.
    """

    sent: int

    def encode(self, values: Array) -> Array:
        """Return float32 values of shape ``(rows, n)`` as bytes, ``(rows, m)`` uint8. Local."""

    def decode(self, code: Array) -> Array:
        """Return the values that :meth:`encode` encoded, as new float32 of shape ``(rows, n)``. Local."""


class Steps:
    """A generator of requests, which continues whenever the requests that it has yielded are done. Local.

    Args:
        requests: The generator; its first step is made at once.
    """

    def __init__(self, requests: Requests) -> None:
        from mpi4py import MPI

        self._are_done = MPI.Request.Testall  # importing MPI takes as long as a call
        self._steps = requests
        self._requests = next(requests, None)

    def test(self) -> bool:
        """Make all steps that need no waiting, and return whether the generator has ended."""
        while self._requests is not None and self._are_done(self._requests):
            self._requests = next(self._steps, None)
        return self._requests is None


class Peers:
    """The ranks of equal number on all nodes, one per node.

    Args:
        mpi_comm: Communicator of these ranks only, in the order of the nodes.

    Attributes:
        mpi_comm: Communicator of these ranks.
        rank: Number of this node.
        size: Number of nodes.
        by_mpi: Whether sums without a codec are MPI's, as there are many nodes.
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
            sent: Arrays to send, one per rank.
            received: Arrays that take the messages, one per rank.
            tag: Tag of the messages, which no other messages have at the same time.
            codec: Codec that counts the sent bytes, or None.
        """
        comm, others = self.mpi_comm, self._others
        requests = [comm.Irecv(received[rank], rank, tag) for rank in others]
        requests += [comm.Isend(sent[rank], rank, tag) for rank in others]
        if codec is not None:
            codec.sent += sum(sent[rank].nbytes for rank in others)
        return requests

    def ask_all(self, flag: Array) -> Requests:
        """Find out whether a flag is true on any of the ranks. Collective, in the same order on all ranks.

        Args:
            flag: Array of one bool, which takes the answer.
        """
        from mpi4py import MPI

        yield [self.mpi_comm.Iallreduce(MPI.IN_PLACE, flag, MPI.LOR)]


def mpi_sum(peers: Peers, total: Array) -> Requests:
    """Sum an array over nodes by MPI's allreduce. Collective, in the same order on all ranks.

    Args:
        peers: The ranks that have the array.
        total: Array that becomes the sum: 1-dimensional, C-contiguous and not empty.
    """
    yield [reduction.begin_sum(peers.mpi_comm, total)]


def _equal_slices(size: int, nodes: int) -> list[slice]:
    """Return slices of ``size`` elements, one per node, of about the same size. Local."""
    edges = [size * node // nodes for node in range(nodes + 1)]
    return [slice(*edge) for edge in zip(edges, edges[1:])]


def direct_sum(peers: Peers, own: Array, total: Array, *, tag: int) -> Requests:
    """Sum an array over a few nodes. Collective.

    Two nodes send each other everything. With more nodes, each sums one slice, and sends the result to the
    others. So there are two steps at most, where an allreduce of MPI has two for each doubling of the nodes.
    Few steps matter because each one waits for a call of MPI, and during backward calls are rare. Nodes are
    added in their order.

    Args:
        peers: The ranks that have the array.
        own: Summand of this rank: 1-dimensional, C-contiguous, not empty. It is only read.
        total: Array of the same size and dtype that takes the sum. It may be ``own``, but not overlap it
            otherwise.
        tag: Tag of the messages. It and the next number are used by no other messages at the same time.
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
    """The bytes by which an array is sent, encoded by a codec or unchanged. Local.

    Args:
        codec: Codec of the numbers; None for none.
        total: Array to send, not empty.

    Attributes:
        code: The array as bytes, one row per number.
    """

    def __init__(self, codec: Codec | None, total: Array) -> None:
        self._codec, self._dtype = codec, total.dtype
        code = self._encode(total)
        self._width = code.size // total.size
        self.code = code.reshape(-1, self._width)

    def encode(self, values: Array) -> Array:
        """Return values as bytes, one row per number."""
        return self._encode(values).reshape(-1, self._width)

    def _encode(self, values: Array) -> Array:
        if self._codec is None:
            return values.view(np.uint8)
        return self._codec.encode(values.astype(np.float32, copy=False)[np.newaxis])

    def decode(self, code: Array) -> Array:
        """Return the values of some rows as a new array."""
        values: Array
        if self._codec is None:
            values = code.reshape(-1).view(self._dtype).copy()
        else:
            values = self._codec.decode(code.reshape(1, -1))[0]
        return values

    def add_up(self, received: Array) -> Array:
        """Return the sum of the arrays that were received from each rank, in the order of the nodes."""
        first, *others = received
        total = self.decode(first)
        for each in others:
            total += self.decode(each)
        return total


def _scatter(
    peers: Peers, code: Array, slices: Sequence[slice], tag: int, codec: Codec | None
) -> tuple[Array, list[MPI.Request]]:
    """Begin to send each slice of an encoded array to its rank. Local.

    Returns:
        The array that takes this rank's slice from each node, one row per node, and the requests.
    """
    own = code[slices[peers.rank]]
    received = np.empty((peers.size, *own.shape), np.uint8)
    received[peers.rank] = own  # decoded on this rank too, so that all get the same bits
    return received, peers.post([code[each] for each in slices], list(received), tag, codec)


def coded_mean(peers: Peers, total: Array, *, scale: float, codec: Codec, tag: int) -> Requests:
    """Average an array over nodes, sent by a codec. Collective.

    Every rank also decodes the numbers that it has sent itself, so that all ranks get the same bits. Two
    nodes send each other everything, and each number is rounded once. With more nodes, each sums one slice
    for the others, and numbers are rounded a second time. Nodes are added in their order.

    Args:
        peers: The ranks that have the array.
        total: Array that becomes the mean: 1-dimensional, not empty, float32 or float64.
        scale: Factor that makes the sum over ``peers`` a mean.
        codec: Codec of the numbers.
        tag: Tag of the messages. It and the next number are used by no other messages at the same time.
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
    """Sum one slice of an array on each node, work on it there, and send the result to the others. Collective.

    Args:
        peers: The ranks that have the array.
        total: 1-dimensional array, not empty. This node's slice becomes the sum, in the order of the nodes,
            or with a codec the mean. ``work`` then replaces it by the result.
        slices: Slices of ``total``, one per node.
        work: Function that is called once the slice is summed.
        sums: Whether there is anything to sum.
        returns: Whether the other nodes get the result.
        scale: Factor that makes the sum over ``peers`` a mean.
        codec: Codec of the numbers that are sent to be summed; None for none.
        tag: Tag of the messages. It and the next number are used by no other messages at the same time.
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
