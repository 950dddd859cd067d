"""The elements of the parameters that each rank updates: blocks, a rank's slice of each, and chunks of a slice."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from chainer_dist.collectives import reduction
from chainer_dist.communicators.shared_memory.layout import Layout as BlockLayout
from chainer_dist.communicators.shared_memory.layout import Place, partition
from chainer_dist.communicators.shared_memory.memory import read_only
from chainer_dist.updates.sharding.chunk import Chunk
from chainer_dist.updates.sharding.fused import fuse
from chainer_dist.updates.sharding.groups import Group, LocalSlice

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Sequence

    import chainer

    from chainer_dist._typing import Array
    from chainer_dist.communicators.shared_memory.communicator import SharedMemoryCommunicator
    from chainer_dist.communicators.shared_memory.layout import Slice
    from chainer_dist.updates.sharding.memory import Memory
    from chainer_dist.updates.sharding.state import RuleStates

__all__ = ["Layout", "LayoutPlan", "elements_of", "positions"]


_CHUNK_BYTES = 1 << 19  # size of the chunks of a single rank


class Layout(NamedTuple):
    """The elements of the parameters that this rank updates.

    Attributes:
        groups: Groups of all parameters that have elements, one for each dtype.
        chunks: This rank's chunks of each parameter.
        means: Read-only mean of each parameter's gradients; None where it is not kept.
    """

    groups: list[Group]
    chunks: list[list[Chunk]]
    means: list[Array | None]


class LayoutPlan:
    """A layout whose memory is not allocated yet. Local.

    Args:
        comm: The communicator whose ranks share the update.
        params: The parameters.
        memory: Memory in which means of gradients are planned.
        order: Indexes of the parameters in the order of an exchange during backward. None stands for the
            order of ``params``, without an exchange during backward.
        stores_means: Whether all means of this rank's slices are needed at the same time.
        keeps_means: Whether the means of all elements are needed after the update.
        across_nodes: Whether each rank of the communicator has a slice of its own.
    """

    def __init__(
        self,
        comm: SharedMemoryCommunicator,
        params: Sequence[chainer.Parameter],
        memory: Memory,
        *,
        order: Sequence[int] | None,
        stores_means: bool,
        keeps_means: bool,
        across_nodes: bool,
    ) -> None:
        self._comm = comm
        self._params = params
        self._is_early = order is not None
        self._stores_means = stores_means
        self._keeps_means = keeps_means
        self._across_nodes = across_nodes
        self._members: dict[np.dtype[Any], list[int]] = {}
        for index in range(len(params)) if order is None else order:
            array = params[index].array
            if array.size:
                self._members.setdefault(array.dtype, []).append(index)
        self._means = {
            dtype: memory.plan(sum(params[index].array.size for index in indices), dtype)
            for dtype, indices in self._members.items()
            if stores_means and comm.size > 1 and not across_nodes
        }

    def build(self, arrays: Sequence[Array], states: RuleStates) -> Layout:
        """Return the layout, once the memory is allocated. Local.

        Args:
            arrays: Arrays that the parameters use from now on.
            states: State of the update rules.
        """
        layout = Layout([], [[] for _ in arrays], [None] * len(arrays))
        for dtype, indices in self._members.items():
            means = self._means[dtype]() if dtype in self._means else None
            layout.groups.append(self._group(indices, arrays, states, means, layout.chunks))
            if means is not None and self._keeps_means:
                ends = itertools.accumulate(arrays[index].size for index in indices)
                for index, end in zip(indices, ends):
                    array = arrays[index]
                    mean = means[end - array.size : end].reshape(array.shape)
                    layout.means[index] = read_only(mean)
        return layout

    def _group(
        self,
        indices: list[int],
        arrays: Sequence[Array],
        states: RuleStates,
        means: Array | None,
        chunks: list[list[Chunk]],
    ) -> Group:
        """Cut the parameters of one dtype into blocks, and this rank's slices into chunks."""
        dtype = arrays[indices[0]].dtype
        wire = reduction.wire_dtype(dtype)
        layout = self._cut([arrays[index].size for index in indices], wire)
        slices = [layout.local_slice(block) for block in layout.blocks]
        group = Group(indices, wire, layout, [])
        scratch = self._scratch(slices, dtype, wire)
        for block, piece in zip(layout.blocks, slices):
            size, start = piece.stop - piece.start, block.start + piece.start
            if means is not None:
                mean = means[start : start + size]
            elif self._stores_means and self._across_nodes:
                mean = np.empty(size, dtype)
            else:
                mean = scratch[:size]
            local = []
            for index, elements, inside in elements_of(indices, piece):
                chunk = Chunk(self._params[index], elements, states.of_chunk(index, elements))
                chunk.bind(arrays[index])
                if self._comm.size > 1:
                    chunk.take_grad(mean[inside])
                chunks[index].append(chunk)
                local.append(chunk)
            fused = fuse(local, mean if self._comm.size > 1 else None)
            group.slices.append(LocalSlice(piece, mean, local, fused))
        return group

    def _cut(self, sizes: list[int], wire: np.dtype[Any]) -> BlockLayout:
        """Return a layout of blocks and slices. On a single rank the only slice of a block is all of it."""
        if self._comm.size == 1:
            blocks = partition(tuple(sizes), _CHUNK_BYTES // wire.itemsize, 1)
            return BlockLayout(blocks, across=False, place=Place(0, 1, 0, 1, 1))
        return self._comm.transport.layout(
            sizes, wire, seldom=self._is_early, across=self._across_nodes
        )

    def _scratch(self, slices: list[Slice], dtype: np.dtype[Any], wire: np.dtype[Any]) -> Array:
        """Return memory for the means of one slice at a time: where possible, the memory that has the sums."""
        if self._comm.size == 1 or dtype != wire:
            return np.empty(max(each.stop - each.start for each in slices), dtype)
        return self._comm.transport.scratch.view(dtype)


def elements_of(indices: Sequence[int], piece: Slice) -> Iterator[tuple[int, slice, slice]]:
    """Yield the elements of each parameter that are in a slice. Local.

    Args:
        indices: Indexes of the parameters, in the order of the exchange.
        piece: The slice.

    Yields:
        The index of a parameter, the slice of its elements, and their place in ``piece``.
    """
    begin = piece.begin
    for index, inside in zip(indices[piece.arrays], piece.inside):
        yield index, slice(begin, begin + inside.stop - inside.start), inside
        begin = 0


def positions(indices: Sequence[int], chosen: Container[int]) -> frozenset[int]:
    """Return the positions in ``indices`` of those that are in ``chosen``. Local."""
    return frozenset([position for position, index in enumerate(indices) if index in chosen])
