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


class Slice(NamedTuple):
    """Consecutive elements of a block: all of some arrays, or of the first and the last a part."""

    start: int  # in the block
    stop: int
    arrays: slice  # which arrays, none of them if there are no elements
    begin: int  # the first element of the first of them
    end: int  # the end in the last of them
    inside: list[slice]  # where each of them is, counted from ``start``

    def views(self, arrays: Sequence[Array]) -> list[Array]:
        """Return what of 1-dimensional arrays is in the slice."""
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
    """What is reduced in one go."""

    start: int  # of its first element, counted through all arrays
    stop: int
    slices: list[Slice]  # one a reducing rank

    @property
    def arrays(self) -> range:
        """The numbers of the arrays of which it has elements."""
        some = [each.arrays for each in self.slices if each.stop > each.start]
        return range(some[0].start, some[-1].stop)


@functools.lru_cache(maxsize=64)
def cut(
    sizes: tuple[int, ...], capacity: int, reducers: int, *, whole: bool = False
) -> list[Block]:
    """Cut arrays, one behind the other, into blocks of ``capacity`` elements. Local.

    Args:
        sizes: Elements of each array.
        capacity: Elements of a block; the last one may have less.
        reducers: How many slices each block has.
        whole: Whether blocks are of one array each, or of several whole ones; then many have less.
    """
    edges = list(itertools.accumulate(sizes, initial=0))
    ends = _ends(edges, capacity) if whole else [*range(capacity, edges[-1], capacity), edges[-1]]
    return [
        Block(start, stop, _share_out(edges, start, stop, reducers))
        for start, stop in zip([0, *ends], ends)
        if start < stop
    ]


def _ends(edges: list[int], capacity: int) -> list[int]:
    """Return where blocks end that have a part of one array, or whole ones."""
    ends = [0]
    for start, stop in zip(edges, edges[1:]):
        if stop - ends[-1] > capacity:  # no room beside those that wait for others
            if start > ends[-1]:
                ends.append(start)
            parts = -(-(stop - start) // capacity)
            if parts > 1:
                ends += [start + (stop - start) * part // parts for part in range(1, parts + 1)]
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
