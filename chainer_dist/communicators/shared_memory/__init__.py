"""The default communicator: ranks of a node average gradients in memory that they share."""

from chainer_dist.communicators.shared_memory.communicator import SharedMemoryCommunicator

__all__ = ["SharedMemoryCommunicator"]
