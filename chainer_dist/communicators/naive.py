"""The communicator that makes one MPI call for each array."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainer_dist.collectives import reduction
from chainer_dist.communicators.communicator_base import CommunicatorBase

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainer_dist._typing import Array


class NaiveCommunicator(CommunicatorBase):
    """Averages array by array, in place.

    The simplest there is, and the reference the others are tested against. Each array stays in
    the cache from the sum to the scaling, which is fast for few large arrays; many small ones
    each pay the latency of a message.
    """

    name = "naive"

    def mean_arrays(self, arrays: Sequence[Array]) -> None:
        """See :meth:`CommunicatorBase.mean_arrays`."""
        for array in arrays:
            reduction.mean_in_place(self.mpi_comm, array)
