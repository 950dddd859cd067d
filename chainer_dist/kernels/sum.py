"""Sums over all dimensions but the channels, such as gradients of biases, as products by a row of ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from chainer.functions.math.sum import Sum

from chainer_dist.kernels import layouts, replacements
from chainer_dist.kernels.matrices import multiply_matrices
from chainer_dist.kernels.replacements import replaces

if TYPE_CHECKING:
    from chainer_dist.kernels.layouts import Array

# Number of values below which the call costs more than it saves.
_FEW = 1 << 14


@replaces(Sum, "forward", needs_onednn=False)
def _sum(chainers: Any, self: Any, inputs: tuple[Array]) -> Any:
    (x,) = inputs
    if (
        x.size < _FEW
        or self.axis is None
        or self.keepdims
        or not layouts.is_suitable(x)
        or x.ndim < 2  # noqa: PLR2004 - batch and channels
        or sorted(a + x.ndim if a < 0 else a for a in self.axis) != [0, *range(2, x.ndim)]
        or not layouts.is_channels_last(x)
    ):
        return chainers(self, inputs)
    rows = layouts.rows(x)
    ones = np.ones((1, len(rows)), np.float32)
    if not replacements.uses_onednn():
        return ((ones @ rows)[0],)
    # Not by BLAS: its threads would keep the cores from those of oneDNN for a while.
    sums = np.empty((1, x.shape[1]), np.float32)
    multiply_matrices(ones, rows, sums)
    return (sums[0],)
