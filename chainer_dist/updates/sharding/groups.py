"""The parameters of one dtype, in blocks of which this rank has a slice each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

    from chainer_dist._typing import Array
    from chainer_dist.communicators.shared_memory.layout import Layout as BlockLayout
    from chainer_dist.communicators.shared_memory.layout import Slice
    from chainer_dist.updates.sharding.chunk import Chunk
    from chainer_dist.updates.sharding.fused import FusedChunks

__all__ = ["Group", "LocalSlice"]


class LocalSlice(NamedTuple):
    """This rank's slice of a block.

    Attributes:
        slice: Its place in the block.
        mean: Array that takes its averaged gradients; not used on a single rank.
        chunks: Its chunks, one a parameter.
        updates: The same elements, as they are updated: small chunks together.
    """

    slice: Slice
    mean: Array
    chunks: list[Chunk]
    updates: list[Chunk | FusedChunks]


class Group(NamedTuple):
    """The parameters of one dtype.

    Attributes:
        indices: Their numbers, in the order of the exchange.
        dtype: Type in which their gradients are summed.
        layout: Layout of the blocks in which they are exchanged.
        slices: This rank's slice of each block.
    """

    indices: list[int]
    dtype: np.dtype[Any]
    layout: BlockLayout
    slices: list[LocalSlice]
