"""The parameters of one dtype, their blocks, and this rank's slice of each block."""

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
        slice: Place of the slice in the block.
        mean: Array that takes the averaged gradients of the slice; not used on a single rank.
        chunks: Chunks of the slice, one per parameter.
        updates: The same chunks, but with small ones fused, to be updated together.
    """

    slice: Slice
    mean: Array
    chunks: list[Chunk]
    updates: list[Chunk | FusedChunks]


class Group(NamedTuple):
    """The parameters of one dtype.

    Attributes:
        indices: Indexes of the parameters, in the order of the exchange.
        dtype: Dtype in which their gradients are summed.
        layout: Layout of the blocks in which they are exchanged.
        slices: This rank's slice of each block.
    """

    indices: list[int]
    dtype: np.dtype[Any]
    layout: BlockLayout
    slices: list[LocalSlice]
