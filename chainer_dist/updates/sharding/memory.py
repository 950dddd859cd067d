"""Memory that the ranks of a node share, for several arrays at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chainer_dist.communicators.shared_memory.memory import share_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from chainer_dist._typing import Array
    from chainer_dist.communicators.shared_memory.communicator import SharedMemoryCommunicator

__all__ = ["Memory"]

_ALIGNMENT = 64  # bytes: a cache line


class Memory:
    """Arrays in one block of memory that the ranks of a node share: first planned, then allocated.

    Args:
        comm: Communicator whose ranks share memory with the other ranks of their node.
    """

    def __init__(self, comm: SharedMemoryCommunicator) -> None:
        self._comm = comm
        self._nbytes = 0
        self._bytes: Array

    def plan(self, size: int, dtype: np.dtype[Any]) -> Callable[[], Array]:
        """Plan a 1-dimensional array, and return a function that returns it once the memory is allocated. Local."""
        start = self._nbytes
        stop = start + size * dtype.itemsize
        self._nbytes = stop + -stop % _ALIGNMENT
        return lambda: self._bytes[start:stop].view(dtype)

    def allocate(self) -> None:
        """Allocate the memory, with zeros. Collective.

        Raises:
            OSError: On every rank, if a node has no room.
        """
        self._bytes = share_memory(self._comm, self._nbytes)
