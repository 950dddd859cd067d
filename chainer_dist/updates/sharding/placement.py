"""The arrays of the parameters in a sharded update: each rank's own, or one per node."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

from chainer_dist.updates.sharding.layout import elements_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import chainer

    from chainer_dist._typing import Array
    from chainer_dist.communicators.shared_memory.communicator import SharedMemoryCommunicator
    from chainer_dist.updates.sharding.layout import Layout
    from chainer_dist.updates.sharding.memory import Memory

__all__ = ["NodeParameters", "OwnParameters", "Placement"]


class Placement(abc.ABC):
    """The arrays of the parameters.

    Attributes:
        arrays: Arrays, one per parameter.
        are_copied: Whether each rank copies the slices that other ranks of the node have updated.
    """

    arrays: list[Array]
    are_copied: bool

    @abc.abstractmethod
    def follow(self, index: int, array: Array, layout: Layout) -> None:
        """Take over an array by which a user has replaced the array of a parameter. Local.

        Args:
            index: Index of the parameter.
            array: The new array.
            layout: Elements that this rank updates.
        """

    def take_memory(self) -> None:  # noqa: B027 - own arrays need none
        """Make the planned arrays, once the memory is allocated. Local."""

    def fill(self, layout: Layout) -> None:  # noqa: B027 - own arrays are filled
        """Copy this rank's elements to the arrays, as each rank of the node must. Local."""

    def attach(self) -> None:  # noqa: B027 - own arrays are attached
        """Set the arrays as arrays of the parameters. Local."""

    def release(self) -> None:  # noqa: B027 - own arrays stay
        """Give every parameter an array of its own. Local."""


class OwnParameters(Placement):
    """Each rank's own arrays, in which all elements are updated in place.

    Args:
        comm: The communicator whose ranks share the update.
        arrays: The arrays of the parameters.
    """

    def __init__(self, comm: SharedMemoryCommunicator, arrays: Sequence[Array]) -> None:
        self.arrays = list(arrays)
        self.are_copied = comm.intra_size > 1

    def follow(self, index: int, array: Array, layout: Layout) -> None:
        """Update the new array from now on. Local."""
        for chunk in layout.chunks[index]:
            chunk.bind(array)
        self.arrays[index] = array


class NodeParameters(Placement):
    """Arrays in memory that the ranks of a node share.

    Args:
        comm: The communicator whose ranks share the update.
        params: The parameters.
        memory: Memory in which the arrays are planned.
    """

    def __init__(
        self,
        comm: SharedMemoryCommunicator,
        params: Sequence[chainer.Parameter],
        memory: Memory,
    ) -> None:
        self.are_copied = False
        self._comm = comm
        self._params = params
        self._planned = [memory.plan(param.size, param.dtype) for param in params]
        self._elements: list[list[slice]] = []  # that this rank copies, by parameter

    def take_memory(self) -> None:
        """See the base class."""
        self.arrays = [
            array().reshape(param.shape) for array, param in zip(self._planned, self._params)
        ]

    def fill(self, layout: Layout) -> None:
        """See the base class.

        The ranks of a node divide all elements among themselves. Each copies its chunks, and if slices are
        across nodes, also the chunks of the ranks of equal number on other nodes.
        """
        self._elements = [[] for _ in self._params]
        for group in layout.groups:
            for block in group.layout.blocks:
                for piece in group.layout.slices_of(self._comm.intra_rank, block):
                    for index, elements, _ in elements_of(group.indices, piece):
                        self._elements[index].append(elements)
        for index, param in enumerate(self._params):
            self._copy(index, param.array)

    def _copy(self, index: int, array: Array) -> None:
        shared, flat = self.arrays[index].reshape(-1), array.reshape(-1)
        for elements in self._elements[index]:
            shared[elements] = flat[elements]

    def follow(self, index: int, array: Array, layout: Layout) -> None:
        """Copy the values of the new array, which the next update replaces by the shared one. Local."""
        del layout
        self._copy(index, array)

    def attach(self) -> None:
        """Set the arrays as arrays of the parameters. Local."""
        for param, array in zip(self._params, self.arrays):
            if param.array is not array:
                param.array = array

    def release(self) -> None:
        """Give every parameter an array of its own. Local."""
        for param, array in zip(self._params, self.arrays):
            if param.array is array:
                param.array = array.copy()
