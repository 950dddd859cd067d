"""The communicator in which one rank of each node exchanges with other nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from chainer_dist.collectives import reduction
from chainer_dist.communicators.flat import FlatCommunicator

if TYPE_CHECKING:
    from mpi4py import MPI

    from chainer_dist._typing import Array


class HierarchicalCommunicator(FlatCommunicator):
    """Sums a packed buffer on each node's first rank, then over the nodes, then sends it back.

    A node sends a buffer once, whatever its number of ranks: for nodes of many ranks on a network
    where few connections are fastest. ChainerMN's ``hierarchical``, up to its version 6, did so
    with GPUs.
    """

    name = "hierarchical"

    def _reduce(self, buffer: Array) -> float:
        """See :meth:`FlatCommunicator._reduce`."""
        from mpi4py import MPI

        leaders = self._leaders
        for piece in reduction.pieces(buffer):
            if self.intra_rank == 0:
                self.node_comm.Reduce(MPI.IN_PLACE, piece, MPI.SUM, root=0)
                reduction.sum_in_place(leaders, piece)
            else:
                self.node_comm.Reduce(piece, None, MPI.SUM, root=0)
            self.node_comm.Bcast(piece, root=0)
        return 1.0 / self.size

    @property
    def _leaders(self) -> MPI.Intracomm:
        """The first ranks of all nodes; not for the other ranks. Collective at first."""
        from mpi4py import MPI

        if "_leaders_comm" not in self.__dict__:
            color = 0 if self.intra_rank == 0 else MPI.UNDEFINED
            self._leaders_comm = cast("MPI.Intracomm", self.mpi_comm.Split(color, self.rank))
        return self._leaders_comm

    def finalize(self) -> None:
        """Give buffers and MPI communicators back. Collective; a second call does nothing."""
        leaders = self.__dict__.pop("_leaders_comm", None)
        if leaders:
            leaders.Free()
        super().finalize()
