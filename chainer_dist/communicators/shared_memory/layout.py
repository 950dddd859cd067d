"""Concatenated arrays cut into blocks, and each block cut into one slice per rank of a node."""

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
    """Parameters of a communicator's exchanges.

    Attributes:
        block_bytes: Number of bytes of a block.
        in_flight: Number of sums between nodes that are under way at a time; 0 on one node.
    """

    block_bytes: int
    in_flight: int


class Place(NamedTuple):
    """The place of a rank among ranks and nodes.

    Attributes:
        rank: Number of this rank on its node.
        ranks: Number of ranks of the node.
        node: Number of this node among the nodes.
        nodes: Number of nodes.
        reducers: Number of ranks of each node that reduce, which is the number of ranks of the smallest node.
    """

    rank: int
    ranks: int
    node: int
    nodes: int
    reducers: int


class Slice(NamedTuple):
    """Consecutive elements of a block: whole arrays, except that the first and the last may be cut.

    Attributes:
        start: Number of the first element, counted from the beginning of the block.
        stop: Number after the last element, counted likewise.
        arrays: Slice of the arrays; empty if there are no elements.
        begin: Number of the first element within the first array.
        end: Number after the last element within the last array.
        inside: Place of each array's elements, counted from ``start``.
    """

    start: int
    stop: int
    arrays: slice
    begin: int
    end: int
    inside: list[slice]

    def views(self, arrays: Sequence[Array]) -> list[Array]:
        """Return views of the elements of 1-dimensional arrays that are in the slice. Local."""
        views = list(arrays[self.arrays])
        if views:
            views[-1] = views[-1][: self.end]
            views[0] = views[0][self.begin :]
        return views

    def gather(self, arrays: Sequence[Array], out: Array | None) -> Array:
        """Return the elements as one array. Local.

        Args:
            arrays: 1-dimensional arrays.
            out: Array that takes the elements. None returns a view of a single array, or a new array.
        """
        views = self.views(arrays)
        if out is None:
            return views[0] if len(views) == 1 else np.concatenate(views)
        if views:
            np.concatenate(views, out=out, casting="same_kind")
        return out

    def scatter(self, values: Array, arrays: Sequence[Array]) -> None:
        """Copy the slice's values to the arrays. Local."""
        for view, inside in zip(self.views(arrays), self.inside):
            view[...] = values[inside]


class Block(NamedTuple):
    """Consecutive elements of all arrays: the unit of the exchange.

    Attributes:
        start: Number of the first element, counted through all arrays.
        stop: Number after the last element, counted likewise.
        slices: Slices, one per rank that reduces.
    """

    start: int
    stop: int
    slices: list[Slice]

    @property
    def arrays(self) -> range:
        """Indexes of the arrays that have elements in the block."""
        some = [each.arrays for each in self.slices if each.stop > each.start]
        return range(some[0].start, some[-1].stop)


class Layout(NamedTuple):
    """Blocks of arrays, and the ranks that reduce their slices. Its methods are local.

    Attributes:
        blocks: Blocks in the order of the exchange, the same on every rank.
        across: Whether each rank of the communicator has a slice of its own, rather than each rank of a
            node. The ranks of equal number on the nodes have consecutive slices.
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
        """Return the slices that a rank of this node sums over the node.

        If slices are across nodes, there is one for each node, and otherwise a single one.
        """
        reducers = self.place.reducers
        if rank < reducers:
            count = len(block.slices) // reducers
            return block.slices[rank * count : (rank + 1) * count]
        size = block.stop - block.start
        return [Slice(size, size, slice(0, 0), 0, 0, [])]

    def slices_of_others(self, block: Block) -> list[tuple[int, Slice]]:
        """Return the slices that other ranks of the node reduce, each after the number of its rank."""
        count, rank = len(block.slices) // self.place.reducers, self.place.rank
        return [
            (number // count, each)
            for number, each in enumerate(block.slices)
            if number // count != rank
        ]


@functools.lru_cache(maxsize=64)
def partition(
    sizes: tuple[int, ...], capacity: int, reducers: int, *, whole: bool = False
) -> list[Block]:
    """Cut concatenated arrays into blocks of ``capacity`` elements. Local.

    Args:
        sizes: Number of elements of each array.
        capacity: Number of elements of a block; the last block may have fewer.
        reducers: Number of slices of each block.
        whole: Whether a block has either elements of a single array or several whole arrays, so that blocks may
            have fewer elements.
    """
    edges = list(itertools.accumulate(sizes, initial=0))
    ends = _ends(edges, capacity) if whole else [*range(capacity, edges[-1], capacity), edges[-1]]
    return [
        Block(start, stop, _share_out(edges, start, stop, reducers))
        for start, stop in zip([0, *ends], ends)
        if start < stop
    ]


def _ends(edges: list[int], capacity: int) -> list[int]:
    """Return the ends of blocks that have either elements of a single array or several whole arrays."""
    ends = [0]
    for start, stop in zip(edges, edges[1:]):
        if stop - ends[-1] > capacity:  # no room in the block with the arrays before
            if start > ends[-1]:
                ends.append(start)
            count = -(-(stop - start) // capacity)
            if count > 1:
                ends += [start + (stop - start) * i // count for i in range(1, count + 1)]
    return [*ends[1:], edges[-1]]


def _share_out(edges: list[int], start: int, stop: int, reducers: int) -> list[Slice]:
    """Return one slice per reducer of the elements ``[start, stop)`` of arrays that begin at ``edges``."""
    slices = []
    for rank in range(reducers):
        low, high = (start + (stop - start) * i // reducers for i in (rank, rank + 1))
        if low == high:
            slices.append(Slice(low - start, low - start, slice(0, 0), 0, 0, []))
            continue
        first = bisect.bisect_right(edges, low) - 1
        last = bisect.bisect_left(edges, high)  # index after the last array
        ends = [low, *edges[first + 1 : last], high]
        inside = [slice(begin - low, end - low) for begin, end in zip(ends, ends[1:])]
        begin, end = low - edges[first], high - edges[last - 1]
        slices.append(Slice(low - start, high - start, slice(first, last), begin, end, inside))
    return slices
