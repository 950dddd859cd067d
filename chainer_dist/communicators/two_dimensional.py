"""The communicator that sums within nodes in slices, and the slices between nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from chainer_dist.collectives import reduction
from chainer_dist.communicators.flat import FlatCommunicator

if TYPE_CHECKING:
    from mpi4py import MPI

    from chainer_dist._typing import Array


class TwoDimensionalCommunicator(FlatCommunicator):
    """Reduce-scatter on each node, allreduce of each slice between nodes, allgather on each node.

    All ranks of a node send at a time, each its own slice, which several links or network cards
    need to be busy. ``shared_memory`` does the same without messages inside a node. ChainerMN's
    ``two_dimensional``, up to its version 6, did so with GPUs.
    """

    name = "two_dimensional"

    def _reduce(self, buffer: Array) -> float:
        """See :meth:`FlatCommunicator._reduce`."""
        from mpi4py import MPI

        slices, peers = self._grid
        node = self.node_comm
        for piece in reduction.pieces(buffer):
            edges = [piece.size * min(rank, slices) // slices for rank in range(node.size + 1)]
            counts = [high - low for low, high in zip(edges, edges[1:])]
            mine = piece[edges[node.rank] : edges[node.rank + 1]].copy()
            node.Reduce_scatter(piece, mine, counts, MPI.SUM)
            if node.rank < slices:
                reduction.sum_in_place(peers, mine)
            node.Allgatherv(mine, [piece, counts])
        return 1.0 / self.size

    @property
    def _grid(self) -> tuple[int, MPI.Intracomm]:
        """How many slices a node has, and the ranks of this one's slice. Collective at first."""
        from mpi4py import MPI

        if "_slices" not in self.__dict__:
            # Nodes may have different numbers of ranks: there are as many slices as the smallest node has ranks.
            slices = cast("int", self.mpi_comm.allreduce(self.intra_size, MPI.MIN))
            color = self.intra_rank if self.intra_rank < slices else MPI.UNDEFINED
            self._slices = slices, cast("MPI.Intracomm", self.mpi_comm.Split(color, self.rank))
        return self._slices

    def finalize(self) -> None:
        """Give buffers and MPI communicators back. Collective; a second call does nothing."""
        _, peers = self.__dict__.pop("_slices", (0, None))
        if peers:
            peers.Free()
        super().finalize()
