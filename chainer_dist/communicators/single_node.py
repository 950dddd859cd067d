"""The communicator that insists on one node."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainer_dist.communicators.shared_memory.communicator import SharedMemoryCommunicator

if TYPE_CHECKING:
    from mpi4py import MPI


class SingleNodeCommunicator(SharedMemoryCommunicator):
    """``shared_memory`` that refuses ranks on several nodes, as ChainerMN's ``single_node`` did.

    Raises:
        ValueError: On every rank, if they are not all on one node.
    """

    name = "single_node"

    def _adopt(self, mpi_comm: MPI.Intracomm) -> None:
        super()._adopt(mpi_comm)
        if self.inter_size > 1:
            nodes = self.inter_size
            self.finalize()
            raise ValueError(
                f"a single_node communicator takes the ranks of one node, these are on {nodes}; "
                "use 'shared_memory', or run on one node"
            )
