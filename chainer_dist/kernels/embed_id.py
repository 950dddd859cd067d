"""The gradient of an embedding in NumPy, without a loop over words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from chainer.functions.connection.embed_id import EmbedIDGrad

from chainer_dist.kernels.replacements import replaces

if TYPE_CHECKING:
    from chainer_dist.kernels.layouts import Array


@replaces(EmbedIDGrad, "forward", needs_onednn=False)
def _gradient(chainers: Any, self: Any, inputs: tuple[Array, Array]) -> Any:
    ids, gy = inputs
    if (
        not isinstance(ids, np.ndarray)
        or not isinstance(gy, np.ndarray)
        or ids.size == 0
        or ids.min() < 0
        or ids.max() >= self.w_shape[0]
    ):
        return chainers(self, inputs)
    self.retain_inputs((0,))
    self._gy_shape = gy.shape
    row = ids.ravel()
    vectors = gy.reshape(row.size, -1)
    order = np.argsort(row, kind="stable")  # stable, so that sums have the same order every time
    ordered = row[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    gw = np.zeros(self.w_shape, gy.dtype)
    gw[ordered[starts]] = np.add.reduceat(vectors[order], starts, axis=0)
    if self.ignore_label is not None and 0 <= self.ignore_label < len(gw):
        gw[self.ignore_label] = 0
    return (gw,)
