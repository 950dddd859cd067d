"""The class that ChainerMN's communicators have in common, and that programs derive their own from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chainer_dist.chainermn._communication_utility import chunked_bcast_obj
from chainer_dist.collectives.group import Group
from chainer_dist.communicators.communicator_base import CommunicatorBase
from chainer_dist.communicators.naive import NaiveCommunicator

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

    from mpi4py import MPI

    from chainer_dist._typing import Array

__all__ = ["MpiCommunicatorBase", "chunked_bcast_obj"]


class MpiCommunicatorBase(CommunicatorBase):
    """What a program's own communicator is derived from, as with ChainerMN.

    A subclass needs no method but ``multi_node_mean_grad(model, zero_fill=False)``. What it does is
    what optimizers do with the gradients; each rank then updates all parameters. Anything else that is
    averaged goes through one MPI call an array, as with ``naive``. Every communicator counts as an
    instance.

    Args:
        mpi_comm: mpi4py intracommunicator, which is duplicated.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in vars(cls):
            cls.name = cls.__name__

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        if cls is MpiCommunicatorBase and CommunicatorBase in other.__mro__:
            return True
        return NotImplemented  # type: ignore[no-any-return]  # as abc wants it

    def mean_arrays(self, arrays: Sequence[Array]) -> None:
        """See :meth:`CommunicatorBase.mean_arrays`."""
        NaiveCommunicator.mean_arrays(self, arrays)  # type: ignore[arg-type]  # it needs no more

    @property
    def mpi_comm(self) -> MPI.Intracomm:
        """The private mpi4py communicator of this group."""
        return super().mpi_comm

    @mpi_comm.setter
    def mpi_comm(self, mpi_comm: MPI.Intracomm) -> None:
        # In an __init__ that does what ChainerMN's does instead of calling it.
        Group.__init__(self, mpi_comm)

    def _init_ranks(self) -> None:
        """Do nothing: ranks and nodes are known. Subclasses call it."""


def refuse_gpus(self: Any, mpi_comm: Any) -> NoReturn:
    """Raise RuntimeError, as ChainerMN does where there is no NCCL."""
    del mpi_comm
    raise RuntimeError(
        f"NCCL is not available: communicator {type(self).name!r} needs GPUs, and chainer_dist "
        "trains on CPU cores; use 'auto'"
    )
