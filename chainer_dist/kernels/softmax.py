"""Softmax cross entropy in NumPy, block by block within the processor's cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import chainer
import numpy as np
from chainer.functions.loss.softmax_cross_entropy import (
    SoftmaxCrossEntropy,
    _check_input_values,
    _SoftmaxCrossEntropyGrad_NoDoubleBackprop,
)

from chainer_dist.kernels import layouts
from chainer_dist.kernels.replacements import replaces

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainer_dist.kernels.layouts import Array

# Values of a block, some 256 kB.
_BLOCK = 1 << 16


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _BLOCK // columns)
    return (slice(low, min(rows, low + step)) for low in range(0, rows, step))


def softmax_rows(x: Array) -> tuple[Array, Array]:
    """Return the softmax of each row of a float32 matrix, new, and the logarithm of each row's sum. Local.

    The logarithm is of the sum of exponentials, (rows, 1).
    """
    y = np.empty(x.shape, np.float32)
    log_sums = np.empty((len(x), 1), np.float32)
    for block in _blocks(*x.shape):
        given, out = x[block], y[block]
        largest = given.max(axis=1, keepdims=True)
        np.subtract(given, largest, out=out)
        np.exp(out, out=out)
        sums = out.sum(axis=1, keepdims=True)
        np.divide(out, sums, out=out)
        np.log(sums, out=sums)
        np.add(largest, sums, out=log_sums[block])
    return y, log_sums


@replaces(SoftmaxCrossEntropy, "forward_cpu", needs_onednn=False)
def _cross_entropy(chainers: Any, self: Any, inputs: tuple[Array, Array]) -> Any:
    x, t = inputs
    if (
        self.class_weight is not None
        or x.ndim != 2  # noqa: PLR2004 - a matrix
        or t.ndim != 1
        or not self.cache_score
        or not layouts.is_suitable(x)
        or not isinstance(t, np.ndarray)
    ):
        return chainers(self, inputs)
    self.retain_inputs((0, 1))
    if chainer.is_debug():
        _check_input_values(x, t, self.ignore_label)
    self.y, log_sums = softmax_rows(x)
    counts = t != self.ignore_label
    rows = np.arange(len(t))
    log_p = (x[rows, t * counts] - log_sums[:, 0]) * counts
    if self.reduce != "mean":
        return (-log_p,)
    count = counts.sum() if self.normalize else len(x)
    self._coeff = 1.0 / max(count, 1)
    loss = log_p.sum(keepdims=True) * (-self._coeff)
    return (loss.astype(x.dtype, copy=False).reshape(()),)


@replaces(_SoftmaxCrossEntropyGrad_NoDoubleBackprop, "forward_cpu", needs_onednn=False)
def _cross_entropy_gradient(chainers: Any, self: Any, inputs: tuple[Array, Array, Array]) -> Any:
    x, t, gloss = inputs
    if (
        self.soft_target
        or self.class_weight is not None
        or self.y is None
        or x.ndim != 2  # noqa: PLR2004 - a matrix
        or gloss.dtype != np.float32
        or not layouts.is_suitable(x, self.y)
    ):
        return chainers(self, inputs)
    counts = (t != self.ignore_label).astype(np.float32)
    scale = gloss if self.coeff is None else gloss * np.float32(self.coeff)
    factors = np.broadcast_to(scale * counts, t.shape)
    gx = np.empty(self.y.shape, np.float32)
    for block in _blocks(*x.shape):
        np.multiply(self.y[block], factors[block, None], out=gx[block])
    gx[np.arange(len(t)), t * (t != self.ignore_label)] -= factors
    return (gx,)
