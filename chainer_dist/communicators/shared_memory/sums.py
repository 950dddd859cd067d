"""The local slice of each block, summed over the ranks of the node and then over the nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np

from chainer_dist.communicators.shared_memory.between_nodes import (
    Steps,
    coded_mean,
    direct_sum,
    mpi_sum,
    slice_of_each,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chainer_dist._typing import Array
    from chainer_dist.communicators.shared_memory.between_nodes import Peers
    from chainer_dist.communicators.shared_memory.exchange import Exchange
    from chainer_dist.communicators.shared_memory.slots import Slots


class Sums:
    """The sums of an exchange's blocks on this rank. Methods are local, except that they may message peers.

    More than ten attributes: most are parts of the description of the exchange that every block reads.

    Args:
        slots: The slots of the node.
        data: Views of the slots in the dtype of the exchange.
        peers: The ranks of equal number on all nodes; None on one node, and on ranks that do not reduce.
        exchange: Description of the exchange.
        ranks: Number of ranks of the communicator.

    Attributes:
        scale: Factor that makes a sum over all ranks a mean; 1 with a codec, whose sums are means already.
        are_by_mpi: Whether sums over nodes are MPI's.
    """

    def __init__(
        self,
        slots: Slots,
        data: list[Array],
        peers: Peers | None,
        exchange: Exchange,
        ranks: int,
    ) -> None:
        self._slots, self._peers, self._exchange = slots, peers, exchange
        self._layout, self._blocks = exchange.layout, exchange.layout.blocks
        # They are not None, nor is an entry, when they are read.
        self._sources = cast("Sequence[Array]", exchange.sources)
        self._codec = exchange.codec if exchange.layout.place.nodes > 1 else None
        self._mean_scale = 1.0 / ranks
        self.scale = self._mean_scale if self._codec is None else 1.0
        self._data = data
        self._first = slots.count
        self.are_by_mpi = (
            peers is not None
            and peers.by_mpi
            and self._codec is None
            and not exchange.layout.across
        )

    def slot(self, index: int) -> Array:
        """Return the place of a block's local slice in this rank's slot."""
        slots = self._slots
        own = self._layout.slices_of(slots.rank, self._blocks[index])
        slot: Array = self._data[slots.rank][(self._first + index) % slots.depth]
        return slot[own[0].start : own[-1].stop]

    def over_node(self, index: int, total: Array) -> None:
        """Sum the local slice of a block over the node.

        Args:
            index: Index of the block.
            total: Array that takes the sum.
        """
        slots, slot = self._slots, (self._first + index) % self._slots.depth
        slices = self._layout.slices_of(slots.rank, self._blocks[index])
        start = slices[0].start
        for own in slices:
            out = total[own.start - start : own.stop - start]
            if slots.ranks == 1:
                own.gather(self._sources, out)
            elif out.size:
                shares = [each[slot][own.start : own.stop] for each in self._data]
                shares[slots.rank] = own.gather(self._sources, None)
                np.add(shares[0], shares[1], out=out)
                for share in shares[2:]:
                    out += share

    def in_place(self, index: int, dtype: np.dtype[Any]) -> Array | None:
        """Return the local slice of a block as a view of the sources, if a sum can read it there, or None.

        That needs a slice of a single array, a single rank on the node, and a direct sum. It is not possible
        during backward: a function might change the gradient in place between sending and adding, and ranks
        would get different sums.
        """
        is_direct = self._codec is None and not self.are_by_mpi
        if not is_direct or self._slots.ranks > 1 or self._exchange.is_ready is not None:
            return None
        views = self._layout.local_slice(self._blocks[index]).views(self._sources)
        is_usable = len(views) == 1 and views[0].dtype == dtype and views[0].flags.c_contiguous
        return views[0] if is_usable else None

    def over_nodes(self, peers: Peers, index: int, own: Array, total: Array) -> Steps:
        """Begin to sum the local slice of a block over the nodes.

        Args:
            peers: The ranks of equal number on all nodes.
            index: Index of the block.
            own: Sum over this node; it may be ``total``.
            total: Array that takes the sum over all nodes.
        """
        if self._codec is not None:
            scale, tag = self._mean_scale, self._tag(index)
            return Steps(coded_mean(peers, total, scale=scale, codec=self._codec, tag=tag))
        if self.are_by_mpi:
            return Steps(mpi_sum(peers, total))
        return Steps(direct_sum(peers, own, total, tag=self._tag(index)))

    def across_nodes(
        self,
        peers: Peers,
        index: int,
        total: Array,
        work: Callable[[int, Array, Array], None],
        *,
        is_summed: bool,
    ) -> Steps:
        """Begin to sum the slices of the ranks of equal number, of which each node gets one.

        Args:
            peers: The ranks of equal number on all nodes.
            index: Index of the block.
            total: Sum over this node.
            work: Function of the index, this rank's slice of the sum over all nodes, and the array that takes
                the result.
            is_summed: Whether there is anything to sum.
        """
        of_nodes = self._layout.slices_of(self._slots.rank, self._blocks[index])
        start = of_nodes[0].start
        slices = [slice(each.start - start, each.stop - start) for each in of_nodes]
        own = total[slices[peers.rank]]
        return Steps(
            slice_of_each(
                peers,
                total,
                slices,
                lambda: work(index, own, own),
                sums=is_summed,
                returns=self._exchange.from_nodes is not None,
                scale=self._mean_scale,
                codec=self._codec,
                tag=self._tag(index),
            )
        )

    def take_from_nodes(self, index: int, total: Array) -> None:
        """Copy the results of other nodes for their slices of a block to the exchange's ``from_nodes``."""
        arrays = self._exchange.from_nodes
        if arrays is None or self._peers is None:
            return
        slices = self._layout.slices_of(self._slots.rank, self._blocks[index])
        for node, each in enumerate(slices):
            if node != self._peers.rank:
                start = each.start - slices[0].start
                each.scatter(total[start : start + each.stop - each.start], arrays)

    def _tag(self, index: int) -> int:
        return 2 * ((self._first + index) % self._slots.depth)
