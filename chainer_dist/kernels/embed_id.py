"""The gradient of an embedding in NumPy, without a loop over words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from chainer.functions.connection.embed_id import EmbedIDGrad

from chainer_dist.kernels.replacements import replaces

if TYPE_CHECKING:
    from chainer_dist.kernels.layouts import Array

# Fewest values of a vector, and of all together, for which additions of whole rows are faster than np.add.reduceat, which
# adds column by column.
_NARROWEST, _SMALLEST = 64, 1 << 14

# Number of vectors of one word up to which they are added together with those of other words.
_FEW = 16


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
    if vectors.shape[1] >= _NARROWEST and vectors.size >= _SMALLEST:
        _add_rows(vectors, order, ordered, starts, gw)
    else:
        gw[ordered[starts]] = np.add.reduceat(vectors[order], starts, axis=0)
    if self.ignore_label is not None and 0 <= self.ignore_label < len(gw):
        gw[self.ignore_label] = 0
    return (gw,)


def _add_rows(vectors: Array, order: Array, words: Array, starts: Array, gw: Array) -> None:
    """Write the sum of the vectors of each word to the word's row of ``gw``. Local.

    Args:
        vectors: Array of shape ``(n, units)``.
        order: Indexes of the vectors, those of one word side by side.
        words: Word of each vector in that order.
        starts: Where each word begins in it.
        gw: Zeros, of shape ``(words, units)``.
    """
    counts = np.diff(starts, append=len(words))
    are_many = counts > _FEW
    for start, count in zip(starts[are_many].tolist(), counts[are_many].tolist()):
        np.add.reduce(vectors[order[start : start + count]], axis=0, out=gw[words[start]])
    starts, counts = starts[~are_many], counts[~are_many]
    gw[words[starts]] = vectors[order[starts]]
    for nth in range(1, counts.max(initial=1)):
        has_more = counts > nth
        starts, counts = starts[has_more], counts[has_more]
        gw[words[starts]] += vectors[order[starts + nth]]
