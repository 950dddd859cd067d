"""The description of an exchange: arrays, their blocks, and the use of their sums."""

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
        deliver: Function that is called for each block of which this rank has a slice. Its arguments are the
            block's index, the slice's sum over all ranks, the factor that makes the sum a mean, and an array
            that takes the result for the other ranks. Both arrays are of ``dtype``, and may be the same one.
            ``deliver`` may change the sum. Ranks of a node are added in the order of rank, up to eight nodes
            in their order, and more nodes in MPI's.
        targets: Arrays that take the slices of the other ranks, or None.
        codec: Codec of the numbers between nodes, the same on every rank; None for none. With a codec, which
            float32 and float64 can have, the sum that is delivered is the mean already.
        absent: Indexes of arrays that are zero on all ranks, or whose sum is not used; the same on every rank.
            A block that has no other arrays is not exchanged, and counts as zero.
        from_nodes: Arrays that take the slices of the ranks of equal number on other nodes, if slices are
            across nodes; independent of ``targets``. None on every rank for none. With them, ``deliver`` is
            called in any order.
        is_ready: Function that returns whether the sources of a block are computed; once True, always True.
            None if all of them are.
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
        """Return the indexes of blocks that are not exchanged; see ``absent``. Local."""
        if not self.absent or self.sources is None:
            return set()
        blocks = enumerate(self.layout.blocks)
        return {index for index, block in blocks if self.absent.issuperset(block.arrays)}


def mean_to(layout: Layout, arrays: Sequence[Array]) -> Deliver:
    """Return a function that delivers the means of the local slices to arrays, and to the other ranks. Local.

    Args:
        layout: Layout of the exchange.
        arrays: 1-dimensional arrays, of the sizes for which the layout was made.
    """

    def deliver(index: int, total: Array, scale: float, out: Array) -> None:
        own = layout.local_slice(layout.blocks[index])
        if layout.place.ranks == 1:  # no other rank of the node needs it in ``out``
            for view, inside in zip(own.views(arrays), own.inside):
                np.multiply(total[inside], scale, out=view, casting="same_kind")
            return
        np.multiply(total, scale, out=out)
        own.scatter(out, arrays)

    return deliver
