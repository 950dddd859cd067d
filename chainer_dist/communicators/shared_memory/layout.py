"""Arrays, one behind the other, cut into blocks, and blocks into a slice for each rank of a node."""

from __future__ import annotations

import bisect
import functools
import itertools
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainer_dist._typing import Array


class Tuning(NamedTuple):
    """How a communicator passes blocks.

    Attributes:
        block_bytes: Bytes of a block.
        in_flight: How many sums between nodes are under way at a time; 0 on one node.
    """

    block_bytes: int
    in_flight: int


class Place(NamedTuple):
    """Where a rank is.

    Attributes:
        rank: Number of this rank on its node.
        ranks: How many ranks the node has.
        node: The number of the node.
        nodes: How many nodes there are.
        reducers: How many ranks of each node reduce: as many as the node of fewest ranks has.
    """

    rank: int
    ranks: int
    node: int
    nodes: int
    reducers: int


class Slice(NamedTuple):
    """Consecutive elements of a block: whole arrays, of the first and the last of which some may be missing."""

    start: int  # in the block
    stop: int
    arrays: slice  # which arrays, none of them if there are no elements
    begin: int  # the first element of the first of them
    end: int  # the end in the last of them
    inside: list[slice]  # where each of them is, counted from ``start``

    def views(self, arrays: Sequence[Array]) -> list[Array]:
        """Return the elements of 1-dimensional arrays that are in the slice."""
        views = list(arrays[self.arrays])
        if views:
            views[-1] = views[-1][: self.end]
            views[0] = views[0][self.begin :]
        return views

    def gather(self, arrays: Sequence[Array], out: Array | None) -> Array:
        """Return the slice, in ``out`` or, if it is of one array and there is no ``out``, a view."""
        views = self.views(arrays)
        if out is None:
            return views[0] if len(views) == 1 else np.concatenate(views)
        if views:
            np.concatenate(views, out=out, casting="same_kind")
        return out

    def scatter(self, values: Array, arrays: Sequence[Array]) -> None:
        """Copy the slice's values to the arrays."""
        for view, inside in zip(self.views(arrays), self.inside):
            view[...] = values[inside]


class Block(NamedTuple):
    """Consecutive elements of all arrays: the unit of the exchange."""

    start: int  # number of its first element, counted through all arrays
    stop: int
    slices: list[Slice]  # one for each rank that reduces

    @property
    def arrays(self) -> range:
        """The numbers of the arrays of which it has elements."""
        some = [each.arrays for each in self.slices if each.stop > each.start]
        return range(some[0].start, some[-1].stop)


class Layout(NamedTuple):
    """Blocks of arrays, and which slice of each block which rank reduces. Its methods are local.

    Attributes:
        blocks: The blocks, in the order of the exchange; the same on every rank.
        across: Whether each rank of the communicator has a slice of its own, rather than each rank of a
            node. The ranks of equal number on the nodes have consecutive ones.
        place: Place of this rank.
    """

    blocks: list[Block]
    across: bool
    place: Place

    def local_slice(self, block: Block) -> Slice:
        """Return the slice of a block that this rank reduces; it may be empty."""
        slices = self.slices_of(self.place.rank, block)
        return slices[self.place.node if len(slices) > 1 else 0]

    def slices_of(self, rank: int, block: Block) -> list[Slice]:
        """Return the slices that a rank of this node sums up over the node.

        That is one for each node if slices are across nodes, and otherwise one, which is for all of them.
        """
        reducers = self.place.reducers
        if rank < reducers:
            count = len(block.slices) // reducers
            return block.slices[rank * count : (rank + 1) * count]
        size = block.stop - block.start
        return [Slice(size, size, slice(0, 0), 0, 0, [])]

    def slices_of_others(self, block: Block) -> list[tuple[int, Slice]]:
        """Return the slices that other ranks of the node reduce, each with the number of that rank."""
        count = len(block.slices) // self.place.reducers
        ranks = [number // count for number in range(len(block.slices))]
        return [each for each in zip(ranks, block.slices) if each[0] != self.place.rank]


@functools.lru_cache(maxsize=64)
def partition(
    sizes: tuple[int, ...], capacity: int, reducers: int, *, whole: bool = False
) -> list[Block]:
    """Cut arrays, one behind the other, into blocks of ``capacity`` elements. Local.

    Args:
        sizes: Number of elements of each array.
        capacity: Number of elements of a block; the last block may have fewer.
        reducers: How many slices each block has.
        whole: Whether each block has elements of one array, or several whole arrays; then many have fewer elements.
    """
    edges = list(itertools.accumulate(sizes, initial=0))
    ends = _ends(edges, capacity) if whole else [*range(capacity, edges[-1], capacity), edges[-1]]
    return [
        Block(start, stop, _share_out(edges, start, stop, reducers))
        for start, stop in zip([0, *ends], ends)
        if start < stop
    ]


def _ends(edges: list[int], capacity: int) -> list[int]:
    """Return where blocks end that have elements of one array, or whole arrays."""
    ends = [0]
    for start, stop in zip(edges, edges[1:]):
        if stop - ends[-1] > capacity:  # no room beside those that wait for others
            if start > ends[-1]:
                ends.append(start)
            count = -(-(stop - start) // capacity)
            if count > 1:
                ends += [start + (stop - start) * i // count for i in range(1, count + 1)]
    return [*ends[1:], edges[-1]]


def _share_out(edges: list[int], start: int, stop: int, reducers: int) -> list[Slice]:
    """Share elements ``[start, stop)`` of arrays, which begin at ``edges``, out to ranks."""
    slices = []
    for rank in range(reducers):
        low, high = (start + (stop - start) * i // reducers for i in (rank, rank + 1))
        if low == high:
            slices.append(Slice(low - start, low - start, slice(0, 0), 0, 0, []))
            continue
        first = bisect.bisect_right(edges, low) - 1
        last = bisect.bisect_left(edges, high)  # behind the last array
        ends = [low, *edges[first + 1 : last], high]
        inside = [slice(begin - low, end - low) for begin, end in zip(ends, ends[1:])]
        begin, end = low - edges[first], high - edges[last - 1]
        slices.append(Slice(low - start, high - start, slice(first, last), begin, end, inside))
    return slices
