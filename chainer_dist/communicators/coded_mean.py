"""Means over nodes of numbers that travel in fewer bytes, and are added up in full precision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from mpi4py import MPI

    from chainer_dist.communicators.arrays import Array

_TWO = 2  # nodes, each of which sends everything to the other


class Code(Protocol):
    """How numbers are sent: each of them by itself, in so many bytes.

    Attributes:
        sent: Bytes that were given to MPI to send to other nodes; added to by who sends.
    """

    sent: int

    def encode(self, values: Array) -> Array:
        """Return float32 values of shape ``(rows, n)`` as bytes, ``(rows, m)`` uint8. Local."""

    def decode(self, code: Array) -> Array:
        """Return what :meth:`encode` encoded, as new float32 of shape ``(rows, n)``. Local."""


class CodedMean:
    """A mean over nodes on its way; nobody touches the array until it is there.

    Every rank decodes what it has sent itself as well, so that all of them come to the same bits. Two
    nodes send each other everything, and each number is rounded once; on the way between more of
    them, where each sums up a part for the others, a second time. Sums are in the order of the nodes.

    A nonblocking collective would have to be begun in the same order on all ranks, but here the second
    message follows when the first is there. So these are messages between two ranks.

    Args:
        peers: The ranks, one a node, that have the array.
        total: 1-dimensional, not empty, float32 or float64. It becomes the mean.
        scale: What makes the sum over ``peers`` a mean.
        code: How numbers are sent.
        tag: Of the messages, and the next number; used by nobody else meanwhile.
    """

    def __init__(
        self, peers: MPI.Intracomm, total: Array, scale: float, code: Code, tag: int
    ) -> None:
        self._peers, self._total, self._code, self._tag = peers, total, code, tag
        nodes = peers.size
        edges = [total.size * node // nodes for node in range(nodes + 1)]
        self._is_whole = nodes == _TWO
        self._parts = (
            [slice(0, total.size)] * nodes
            if self._is_whole
            else [slice(low, high) for low, high in zip(edges, edges[1:])]
        )
        np.multiply(total, scale, out=total)
        encoded = self._encode(total)
        self._bytes = encoded.size // total.size  # of a number
        self._sent = encoded.reshape(-1, self._bytes)
        own = self._sent[self._parts[peers.rank]]
        self._received = np.empty((nodes, *own.shape), np.uint8)
        self._received[peers.rank] = own
        self._requests = self._exchange(
            [self._sent[part] for part in self._parts], list(self._received)
        )
        self._is_last = self._is_whole

    def test(self) -> bool:
        """Do what can be done without waiting; return whether the mean is there. Local."""
        from mpi4py import MPI

        if self._requests and MPI.Request.Testall(self._requests):
            self._requests = []
            if self._is_last:
                self._finish()
            else:
                self._send_back()
        return not self._requests

    def _send_back(self) -> None:
        """Send the sum of the own part to everybody."""
        own = self._encode(self._add_up()).reshape(-1, self._bytes)
        self._received = np.empty_like(self._sent)
        self._received[self._parts[self._peers.rank]] = own
        self._sent = own
        self._requests = self._exchange(
            [own] * self._peers.size, [self._received[part] for part in self._parts], stage=1
        )
        self._is_last = True

    def _finish(self) -> None:
        if self._is_whole:
            self._total[...] = self._add_up()
        else:
            self._total[...] = self._decode(self._received)

    def _add_up(self) -> Array:
        first, *others = self._received
        total = self._decode(first)
        for each in others:
            total += self._decode(each)
        return total

    def _exchange(
        self, sent: list[Array], received: list[Array], stage: int = 0
    ) -> list[MPI.Request]:
        """Begin to send to, and to receive from, each of the others."""
        others = [rank for rank in range(self._peers.size) if rank != self._peers.rank]
        tag = self._tag + stage
        requests = [self._peers.Irecv(received[rank], rank, tag) for rank in others]
        requests += [self._peers.Isend(sent[rank], rank, tag) for rank in others]
        self._code.sent += sum(sent[rank].nbytes for rank in others)
        return requests

    def _encode(self, values: Array) -> Array:
        return self._code.encode(values.astype(np.float32, copy=False)[np.newaxis])

    def _decode(self, code: Array) -> Array:
        values: Array = self._code.decode(code.reshape(1, -1))[0]
        return values
