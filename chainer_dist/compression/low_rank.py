"""Matrices of low rank in the place of gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from chainer_dist._counts import checked_count
from chainer_dist.collectives.agreement import digest
from chainer_dist.compression.compression import (
    Kept,
    NodeCompression,
    allreduce_mean,
    are_too_large,
)

if TYPE_CHECKING:
    import chainer

    from chainer_dist._typing import Array
    from chainer_dist.communicators import CommunicatorBase
    from chainer_dist.compression.compression import Nodes


class PowerSGD(NodeCompression):
    """Approximates each gradient by a matrix of low rank (Vogels et al., arXiv 1905.13727).

    A gradient of shape ``(n, ...)`` is a matrix of ``n`` rows; of an ``(n, m)`` matrix only
    ``rank * (n + m)`` numbers are sent. One step of a power iteration is made at a time, beginning with
    the result of the last (warm start), and what was left out is added to the next gradients (error
    feedback). Vectors, and matrices for which it does not pay, are averaged exactly.

    All ranks compute the approximation by themselves: on machines of different processors their
    parameters can differ in the last bits.

    Args:
        rank: Rank of the approximation, 1 or more.

    Raises:
        ValueError: If ``rank`` is not at least 1.
    """

    def __init__(self, rank: int = 2) -> None:
        super().__init__()
        self.rank = checked_count("rank", rank, 1)
        self._rights = Kept()  # the last right factors, the same on every rank

    @property
    def _kept(self) -> list[Kept]:
        return [*super()._kept, self._rights]

    def mean_over_nodes(self, nodes: Nodes, grads: dict[str, Array]) -> None:
        """See :meth:`NodeCompression.mean_over_nodes`."""
        matrices = {
            name: grad.reshape(len(grad), -1) for name, grad in grads.items() if self._pays(grad)
        }
        rest = [grad for name, grad in grads.items() if name not in matrices]
        self._residual.add_to(matrices)
        rights = {name: self._start(name, matrix) for name, matrix in matrices.items()}
        lefts = {name: matrix @ rights[name] for name, matrix in matrices.items()}
        self.sent = allreduce_mean(nodes, [*lefts.values(), *rest])
        for name, matrix in matrices.items():
            lefts[name] = left = _orthonormal(lefts[name])
            rights[name] = right = np.ascontiguousarray(matrix.T @ left)
            # Less than what this node has sent itself: less than the mean would leave a part of its own
            # that is never sent, and grows, as what the other nodes keep makes up for it.
            if not are_too_large(matrix):
                self._residual.keep(name, matrix - left @ right.T)
        self.sent += allreduce_mean(nodes, list(rights.values()))
        for name, matrix in matrices.items():
            matrix[...] = lefts[name] @ rights[name].T
            if not are_too_large(rights[name]):
                self._rights.keep(name, rights[name])

    def _pays(self, grad: Array) -> bool:
        rows = grad.shape[0] if grad.ndim else 1
        columns = grad.size // max(rows, 1)
        return self.rank * (rows + columns) < grad.size

    def _start(self, name: str, matrix: Array) -> Array:
        """Return the right factor to begin with, the same on every rank."""
        shape = (matrix.shape[1], self.rank)
        last = self._rights.get(name, shape)
        if last is not None:
            return _normalized(last)
        random = np.random.RandomState(digest((name, shape)) % (1 << 32))
        return random.standard_normal(shape).astype(matrix.dtype)

    def serialize(self, serializer: chainer.AbstractSerializer, comm: CommunicatorBase) -> None:
        """See :meth:`NodeCompression.serialize`."""
        super().serialize(serializer, comm)
        self._rights.serialize(serializer["rights"])


def _normalized(matrix: Array) -> Array:
    """Return a matrix whose columns are multiplied by powers of 2, so that products stay in range."""
    _, exponents = np.frexp(np.abs(matrix).max(axis=0))
    normalized: Array = np.ldexp(matrix, -exponents)
    return normalized


def _orthonormal(matrix: Array) -> Array:
    """Return an orthonormal basis of the columns; zeros for columns that depend on others."""
    basis = np.linalg.qr(matrix)[0]
    return np.ascontiguousarray(basis, matrix.dtype)
