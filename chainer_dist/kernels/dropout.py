"""Dropout in NumPy, in blocks that fit the processor's cache, with the same random numbers as Chainer's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from chainer.functions.noise.dropout import Dropout

from chainer_dist.kernels import layouts
from chainer_dist.kernels.replacements import replaces

if TYPE_CHECKING:
    from chainer_dist.kernels.layouts import Array

# Number of values of a block, which take 128 kB of random numbers.
_BLOCK = 1 << 14


def draw_mask(shape: tuple[int, ...], ratio: float) -> Array:
    """Return a new C-contiguous float32 mask of zeros and 1 / (1 - ratio), drawn by ``numpy.random``. Local."""
    mask = np.empty(shape, np.float32)
    row = mask.reshape(-1)
    scale = np.float32(1.0 / (1 - ratio))
    for low in range(0, row.size, _BLOCK):
        block = row[low : low + _BLOCK]
        kept = np.random.rand(block.size) >= ratio  # noqa: NPY002 - as Chainer draws
        np.multiply(kept, scale, out=block)
    return mask


@replaces(Dropout, "forward_cpu", needs_onednn=False)
def _dropout(chainers: Any, self: Any, inputs: tuple[Array]) -> Any:
    (x,) = inputs
    if self.mask is not None or not layouts.is_suitable(x) or not x.flags.c_contiguous:
        return chainers(self, inputs)
    self.mask = draw_mask(x.shape, self.dropout_ratio)
    return (x * self.mask,)
