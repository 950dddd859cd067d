"""ChainerMN's place for the class of the communicator ``pure_nccl``, which needs GPUs."""

from __future__ import annotations

from chainer_dist.chainermn.mpi_communicator_base import MpiCommunicatorBase, refuse_gpus

__all__ = ["PureNcclCommunicator"]


class PureNcclCommunicator(MpiCommunicatorBase):
    """No communicator is an instance of this class; to make one is an error."""

    name = "pure_nccl"
    __init__ = refuse_gpus
