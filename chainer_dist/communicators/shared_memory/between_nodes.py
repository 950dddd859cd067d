"""Sums over nodes by messages between their ranks: fewer steps than MPI's, fewer bytes, or a part for each node."""

from __future__ import annotations

import collections
import functools
import operator
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mpi4py import MPI

    from chainer_dist._typing import Array

MOST_NODES = 8  # of a DirectSum; on more the messages become many and small
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


class _Steps:
    """Messages between ranks, and what follows when they are there, one step after the other.

    A nonblocking collective would have to be begun in the same order on all ranks, but here one step
    follows when another is over. So these are messages between two ranks.

    Args:
        peers: The ranks, one a node.
        tag: Of the messages, and the next number; used by nobody else meanwhile.
    """

    def __init__(self, peers: MPI.Intracomm, tag: int) -> None:
        from mpi4py import MPI

        self._are_done = MPI.Request.Testall  # importing MPI takes as long as a call
        self._peers, self._tag = peers, tag
        self._others = [rank for rank in range(peers.size) if rank != peers.rank]
        self._requests: list[MPI.Request] = []
        self._steps: collections.deque[Callable[[], None]] = collections.deque()

    def test(self) -> bool:
        """Do what can be done without waiting; return whether that was all. Local."""
        while self._are_done(self._requests):
            self._requests = []
            if not self._steps:
                return True
            self._steps.popleft()()
        return False

    def _exchange(self, sent: Sequence[Array], received: Sequence[Array]) -> int:
        """Begin to send to, and to receive from, each of the others; return how many bytes are sent.

        Nobody touches the arrays until the next step.
        """
        others, tag = self._others, self._tag
        self._tag += 1
        self._requests = [self._peers.Irecv(received[rank], rank, tag) for rank in others]
        self._requests += [self._peers.Isend(sent[rank], rank, tag) for rank in others]
        return sum(sent[rank].nbytes for rank in others)


def _one_each(size: int, nodes: int) -> list[slice]:
    """Return which of so many elements each node sums up."""
    edges = [size * node // nodes for node in range(nodes + 1)]
    return [slice(*edge) for edge in zip(edges, edges[1:])]


class DirectSum(_Steps):
    """A sum over a few nodes on its way; nobody touches the arrays until it is there.

    Two nodes send each other everything. Of more, each sums up a part and sends that to the others. So
    there are two steps at most, where an allreduce of MPI has two for each doubling of the nodes; and
    each step waits until MPI is called, which during backward is seldom. Sums are in the order of the
    nodes.

    Args:
        peers: The ranks, one a node, that have the array.
        own: What this rank adds: 1-dimensional, C-contiguous, not empty. It is only read.
        total: Of the same size and dtype, takes the sum; it may be ``own``, but not overlap it
            otherwise.
        tag: Of the messages, and the next number; used by nobody else meanwhile.
    """

    def __init__(self, peers: MPI.Intracomm, own: Array, total: Array, *, tag: int) -> None:
        super().__init__(peers, tag)
        self._own, self._total = own, total
        nodes = peers.size
        if nodes == _TWO:
            received = np.empty_like(own) if own is total else total
            self._received = [received] * nodes
            self._exchange([own] * nodes, self._received)
            self._steps.append(self._add_other)
            return
        self._parts = _one_each(own.size, nodes)
        part = own[self._parts[peers.rank]]
        self._received = list(np.empty((nodes, part.size), own.dtype))
        self._received[peers.rank] = part
        self._exchange([own[each] for each in self._parts], self._received)
        self._steps.append(self._send_back)

    def _add_other(self) -> None:
        np.add(self._own, self._received[0], out=self._total)

    def _send_back(self) -> None:
        """Send the sum of the own part to everybody."""
        part = self._total[self._parts[self._peers.rank]]
        part[...] = functools.reduce(operator.iadd, self._received[1:], self._received[0].copy())
        self._exchange([part] * self._peers.size, [self._total[each] for each in self._parts])


class _Parts(_Steps):
    """An array on its way, each part of it to the rank that sums it up."""

    def __init__(
        self,
        peers: MPI.Intracomm,
        total: Array,
        parts: Sequence[slice],
        *,
        scale: float,
        code: Code | None,
        tag: int,
    ) -> None:
        super().__init__(peers, tag)
        self._total, self._parts, self._scale, self._code = total, parts, scale, code
        self._own = parts[peers.rank]

    def _scatter(self) -> None:
        """Send all parts."""
        if self._code is not None:
            np.multiply(self._total, self._scale, out=self._total)
        encoded = self._encode(self._total)
        self._bytes = encoded.size // self._total.size  # of a number
        self._sent = encoded.reshape(-1, self._bytes)
        own = self._sent[self._own]
        self._received = np.empty((self._peers.size, *own.shape), np.uint8)
        self._received[self._peers.rank] = own  # what is sent is decoded here, too
        self._send([self._sent[part] for part in self._parts], list(self._received))

    def _send(self, sent: Sequence[Array], received: Sequence[Array]) -> None:
        nbytes = self._exchange(sent, received)
        if self._code is not None:
            self._code.sent += nbytes

    def _add_up(self) -> Array:
        """Return the sum of the own part, in the order of the nodes."""
        first, *others = self._received
        total = self._decode(first)
        for each in others:
            total += self._decode(each)
        return total

    def _encode(self, values: Array) -> Array:
        if self._code is None:
            return values.view(np.uint8)
        return self._code.encode(values.astype(np.float32, copy=False)[np.newaxis])

    def _decode(self, code: Array) -> Array:
        values: Array
        if self._code is None:
            values = code.reshape(-1).view(self._total.dtype).copy()
        else:
            values = self._code.decode(code.reshape(1, -1))[0]
        return values


class CodedMean(_Parts):
    """A mean over nodes on its way in a code; nobody touches the array until it is there.

    Every rank decodes what it has sent itself as well, so that all of them come to the same bits. Two
    nodes send each other everything, and each number is rounded once; on the way between more of
    them, where each sums up a part for the others, a second time. Sums are in the order of the nodes.

    Args:
        peers: The ranks, one a node, that have the array.
        total: 1-dimensional, not empty, float32 or float64. It becomes the mean.
        scale: What makes the sum over ``peers`` a mean.
        code: How numbers are sent.
        tag: Of the messages, and the next number; used by nobody else meanwhile.
    """

    def __init__(
        self, peers: MPI.Intracomm, total: Array, *, scale: float, code: Code, tag: int
    ) -> None:
        nodes = peers.size
        is_whole = nodes == _TWO
        parts = [slice(0, total.size)] * nodes if is_whole else _one_each(total.size, nodes)
        super().__init__(peers, total, parts, scale=scale, code=code, tag=tag)
        self._scatter()
        self._steps.extend(
            [self._take_sum] if is_whole else [self._send_back, self._take_everything]
        )

    def _take_sum(self) -> None:
        self._total[...] = self._add_up()

    def _send_back(self) -> None:
        """Send the sum of the own part to everybody."""
        own = self._encode(self._add_up()).reshape(-1, self._bytes)
        self._received = np.empty_like(self._sent)
        self._received[self._own] = own
        self._sent = own
        self._send([own] * self._peers.size, [self._received[part] for part in self._parts])

    def _take_everything(self) -> None:
        self._total[...] = self._decode(self._received)


class PartOfEach(_Parts):
    """A sum over nodes of which each node gets a part, and gives what it makes of that to the others.

    Args:
        peers: The ranks, one a node, that have the array.
        total: 1-dimensional, not empty. Its own part becomes the sum, in the order of the nodes; with
            a code the mean. Then ``work`` makes of it what the others get.
        parts: Of ``total``, one a node.
        work: Called when the sum is there.
        sums: Whether there is anything to sum; if not, ``work`` is called at once.
        returns: Whether the others get what was made.
        scale: What makes the sum over ``peers`` a mean.
        code: How numbers are sent to who sums them up; None as they are.
        tag: Of the messages, and the next number; used by nobody else meanwhile.
    """

    def __init__(
        self,
        peers: MPI.Intracomm,
        total: Array,
        parts: Sequence[slice],
        work: Callable[[], None],
        *,
        sums: bool,
        returns: bool,
        scale: float,
        code: Code | None,
        tag: int,
    ) -> None:
        super().__init__(peers, total, parts, scale=scale, code=code, tag=tag)
        if sums:
            self._scatter()
            self._steps.append(self._take_sum)
        self._steps.append(work)
        if returns:
            self._steps.append(self._return)

    def _take_sum(self) -> None:
        self._total[self._own] = self._add_up()

    def _return(self) -> None:
        own = self._total[self._own]
        self._exchange([own] * self._peers.size, [self._total[part] for part in self._parts])
