"""What is exchanged: the arrays, how they are cut, and what becomes of their sums."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chainer_dist._typing import Array
    from chainer_dist.communicators.shared_memory.between_nodes import Codec
    from chainer_dist.communicators.shared_memory.layout import Block, Layout

    # See Exchange.deliver.
    Deliver = Callable[[int, Array, float, Array], None]


class Exchange(NamedTuple):
    """Arrays to reduce, work on the local slice of each block, and arrays that take the result.

    Attributes:
        layout: Blocks and slices; see :meth:`Transport.layout`.
        dtype: The dtype in which ``sources`` are summed.
        sources: 1-dimensional arrays, unchanged except where ``deliver`` or ``targets`` change them. None if
            there is nothing to sum. With ``is_ready`` an entry may be None until its blocks are ready.
        deliver: Called for each block of which this rank has a slice, with the block's index, the slice's sum
            over all ranks, the factor that makes it a mean, and an array that takes what the other ranks
            get; both arrays are of ``dtype``, and may be one. ``deliver`` may change the sum. On a node it is
            added in the order of rank; between up to eight nodes in theirs, between more as MPI does.
        targets: Arrays that take the slices of the other ranks; None if they are not wanted.
        codec: How numbers are sent between nodes, the same on every rank; None as they are. The sum that is
            delivered is the mean already if there is one. Only for float32 and float64.
        absent: The numbers of arrays, the same on every rank, that are zero on all of them, or whose sum is not
            wanted. A block that has no other arrays is not exchanged: it counts as zero.
        from_nodes: Arrays that take the slices of the ranks of equal number on other nodes, if blocks are cut
            across nodes, also when ``targets`` is None. None, on every rank, if that is not wanted.
            ``deliver`` is then called in any order.
        is_ready: Function that returns whether the sources of a block are there; once True, always True. None
            if all of them are.
    """

    layout: Layout
    dtype: np.dtype[Any]
    sources: Sequence[Array | None] | None
    deliver: Deliver
    targets: Sequence[Array] | None = None
    codec: Codec | None = None
    absent: frozenset[int] = frozenset()
    from_nodes: Sequence[Array] | None = None
    is_ready: Callable[[Block], bool] | None = None

    def blank(self) -> set[int]:
        """Return the indices of blocks that have nothing to sum, in an exchange that sums. Local."""
        if not self.absent or self.sources is None:
            return set()
        blocks = enumerate(self.layout.blocks)
        return {index for index, block in blocks if self.absent.issuperset(block.arrays)}


def mean_to(layout: Layout, arrays: Sequence[Array]) -> Deliver:
    """Return a function that delivers the mean of the local slices to arrays, and to the other ranks. Local.

    Args:
        layout: The layout of the exchange.
        arrays: 1-dimensional arrays, of the sizes that were laid out.
    """

    def deliver(index: int, total: Array, scale: float, out: Array) -> None:
        own = layout.local_slice(layout.blocks[index])
        if layout.place.ranks == 1:  # no other rank takes it from where it is
            for view, inside in zip(own.views(arrays), own.inside):
                np.multiply(total[inside], scale, out=view, casting="same_kind")
            return
        np.multiply(total, scale, out=out)
        own.scatter(out, arrays)

    return deliver
