"""ChainerMN's place for the class of the communicator ``non_cuda_aware``, which needs GPUs."""

from __future__ import annotations

from chainer_dist.chainermn.mpi_communicator_base import MpiCommunicatorBase, refuse_gpus

__all__ = ["NonCudaAwareCommunicator"]


class NonCudaAwareCommunicator(MpiCommunicatorBase):
    """No communicator is an instance of this class; to make one is an error."""

    name = "non_cuda_aware"
    __init__ = refuse_gpus
