"""Only the largest numbers of all gradients."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from chainer_dist.compression.compression import Compression

if TYPE_CHECKING:
    from chainer_dist.communicators.arrays import Array
    from chainer_dist.compression.compression import Nodes


class TopK(Compression):
    """Each node sends its largest numbers, and keeps the others for later (error feedback).

    Deep gradient compression (Lin et al., arXiv 1712.01887) without its momentum correction. With
    ``density`` 0.01 that is a fiftieth of the bytes between two nodes; as all nodes get the numbers
    of all, it grows with their number.

    Args:
        density: The part of all numbers that is sent, above 0 and up to 1.

    Raises:
        ValueError: If it is something else.
    """

    def __init__(self, density: float = 0.01) -> None:
        super().__init__()
        if not 0 < density <= 1:
            raise ValueError(f"density is {density}, expected a number above 0 and up to 1")
        self.density = density

    def mean_over_nodes(self, nodes: Nodes, grads: dict[str, Array]) -> None:
        """See :meth:`Compression.mean_over_nodes`."""
        comm = nodes.mpi_comm
        flat = np.concatenate([np.ravel(grad) for grad in grads.values()]).astype(np.float32)
        self._residual.add_to({"all": flat})
        if not flat.size:
            return
        count = math.ceil(self.density * flat.size)
        largest = np.argpartition(np.abs(flat), flat.size - count)[flat.size - count :]
        indices = np.sort(largest).astype(np.uint32 if flat.size < 1 << 32 else np.uint64)
        values = flat[indices]
        flat[indices] = 0
        self._residual.keep("all", flat)
        all_indices = np.empty((comm.size, count), indices.dtype)
        all_values = np.empty((comm.size, count), values.dtype)
        comm.Allgather(indices, all_indices)
        comm.Allgather(values, all_values)
        self.sent = (indices.nbytes + values.nbytes) * (comm.size - 1)
        mean = np.zeros_like(flat)
        for where, what, weight in zip(all_indices, all_values, nodes.weights):
            mean[where] += what * np.float32(weight)
        start = 0
        for grad in grads.values():
            grad[...] = mean[start : start + grad.size].reshape(grad.shape)
            start += grad.size
