"""Only the rows of a gradient that are not zero, such as the rows of the words in a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np

from chainer_dist.collectives import reduction
from chainer_dist.compression.compression import Compression

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainer_dist._typing import Array
    from chainer_dist.communicators import CommunicatorBase

_INDEX = np.dtype(np.int64)

_SAMPLE = 64  # rows that are looked at first; if none of them is zero, hardly any is


class SparseRows(Compression):
    """Exchanges the rows of each gradient that are not zero on some rank, and their numbers. Exact.

    For embeddings (the ``W`` of ``EmbedID``), of which a batch changes a few rows, on a node and
    between nodes. Nothing is left out: results equal the exact mean up to rounding. On one node they
    equal the results of the communicator ``shared_memory`` to the bit (except that -0 is 0), as rows are
    summed in the order of rank.

    A gradient of shape ``(n, ...)`` has ``n`` rows. Where the rows that all ranks have would be more
    bytes than the gradient itself, all of it is averaged as without this; so are vectors. The ranks
    decide that together, for each gradient and each update anew.

    Between nodes, only sums of a node's rows travel. ``sent`` counts what a node's first rank sends
    for the node, whole gradients with 2 (n - 1) / n of their bytes on n nodes.
    """

    def mean(self, comm: CommunicatorBase, grads: dict[str, Array]) -> None:
        """Replace gradients by their means over the ranks, in place. Collective.

        See :meth:`Compression.mean`.
        """
        if self._comm is not comm:
            self._connect(comm)
        numbers = {name: _rows_of(grad) for name, grad in grads.items()}
        counts = np.array(
            [
                (len(grad) if grad.ndim else 1) if rows is None else len(rows)
                for grad, rows in zip(grads.values(), numbers.values())
            ],
            np.int64,
        )
        reduction.sum_in_place(comm.mpi_comm, counts)
        sparse: list[str] = []
        dense: list[str] = []
        for (name, grad), count in zip(grads.items(), counts.tolist()):
            pays = (
                grad.ndim not in (0, 1)
                and count * (_row_bytes(grad) + _INDEX.itemsize) < grad.nbytes
            )
            (sparse if pays else dense).append(name)
        if dense:
            comm.mean_arrays([grads[name] for name in dense])
        self.sent = 0
        if self._nodes is not None:
            nodes = self._nodes.mpi_comm.size
            nbytes = sum([grads[name].nbytes for name in dense])
            self.sent = 2 * nbytes * (nodes - 1) // nodes
        if sparse:
            self._mean_rows(comm, {name: grads[name] for name in sparse}, numbers)

    def _mean_rows(
        self, comm: CommunicatorBase, grads: dict[str, Array], numbers: dict[str, Array | None]
    ) -> None:
        node = cast("CommunicatorBase", self._node)
        own = []
        for name, grad in grads.items():
            rows = numbers[name]
            where = np.arange(len(grad)) if rows is None else rows
            values = grad[where].reshape(len(where), grad[0].size)
            own.append(_Rows(where, values.astype(reduction.wire_dtype(grad.dtype), copy=False)))
        sums = _sum(node.allgather_obj(own))
        if comm.inter_size > 1:
            if self._nodes is not None:
                from mpi4py.util import pkl5

                others = self._nodes.mpi_comm.size - 1
                self.sent += others * sum(each.where.nbytes + each.values.nbytes for each in sums)
                sums = _sum(pkl5.Intracomm(self._nodes.mpi_comm).allgather(sums))
            sums = node.bcast_obj(sums)
        for grad, (where, values) in zip(grads.values(), sums):
            mean = values * values.dtype.type(1.0 / comm.size)
            grad[where] = mean.reshape(-1, *grad.shape[1:])


class _Rows(NamedTuple):
    """Some rows of a gradient."""

    where: Array  # their numbers, ascending
    values: Array  # (rows, columns)


def _sum(parts: Sequence[Sequence[_Rows]]) -> list[_Rows]:
    """Add up the rows of several parts, in the order of these; each has some of every gradient."""
    sums = []
    for several in zip(*parts):
        where = np.unique(np.concatenate([each.where for each in several]))
        values = np.zeros((len(where), several[0].values.shape[1]), several[0].values.dtype)
        for each in several:
            values[np.searchsorted(where, each.where)] += each.values
        sums.append(_Rows(where, values))
    return sums


def _row_bytes(grad: Array) -> int:
    return grad.nbytes // max(len(grad), 1)


def _rows_of(grad: Array) -> Array | None:
    """Return the numbers of the rows that are not zero, or None if most likely all are. Local."""
    if grad.ndim in (0, 1) or not grad.size:
        return None
    # As integers, which NumPy compares fastest; NaN is not zero either.
    size = 8 if _row_bytes(grad) % 8 == 0 else grad.itemsize
    if not _bits(grad[:: -(-len(grad) // _SAMPLE)], size).all():
        return np.flatnonzero(_bits(grad, size)).astype(_INDEX, copy=False)
    return None


def _bits(rows: Array, size: int) -> Array:
    """Return for each row an integer that is 0 if the row is."""
    flat = np.ascontiguousarray(rows).reshape(len(rows), -1).view(f"u{size}")
    bits: Array = np.bitwise_or.reduce(flat, axis=1)
    return bits
