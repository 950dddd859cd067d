"""Softmax and its logarithm by oneDNN, and softmax cross entropy in NumPy, in blocks that fit the cache."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import chainer
import numpy as np
from chainer.functions.activation.log_softmax import LogSoftmax, LogSoftmaxGrad
from chainer.functions.activation.softmax import Softmax, _SoftmaxGrad
from chainer.functions.loss.softmax_cross_entropy import (
    SoftmaxCrossEntropy,
    _check_input_values,
    _SoftmaxCrossEntropyGrad_NoDoubleBackprop,
)

from chainer_dist.kernels import layouts, memory, onednn, replacements
from chainer_dist.kernels.cache import kept
from chainer_dist.kernels.matrices import multiply_into
from chainer_dist.kernels.onednn import (
    DIFF_DST,
    DIFF_SRC,
    DST,
    PRODUCT,
    SECOND_SRC,
    SRC,
    TRAINING,
    Description,
    Layout,
    Operation,
)
from chainer_dist.kernels.replacements import replaces
from chainer_dist.kernels.shared_library import library

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chainer_dist.kernels.layouts import Array

_SOFTMAX, _LOG_SOFTMAX = 0x30000, 0x30001

# Number of values of a block, which take 256 kB.
_BLOCK = 1 << 16

# A smaller softmax has lost too many bits for its logarithm.
_TINY = np.float32(1e-30)


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _BLOCK // columns)
    return (slice(low, min(rows, low + step)) for low in range(0, rows, step))


def softmax_rows(x: Array, labels: Array) -> tuple[Array, Array]:
    """Return the softmax of each row of a matrix, and its logarithm at one column of each row. Local.

    Args:
        x: Matrix of shape ``(rows, columns)``, float32.
        labels: Columns, of shape ``(rows,)``, integers.

    Returns:
        New arrays of shape ``(rows, columns)`` and ``(rows,)``, float32.
    """
    places = np.arange(len(x)), labels
    if not replacements.uses_onednn() or not _have_largest(x):
        y, log_sums = _softmax_rows_by_numpy(x)
        return y, x[places] - log_sums
    x = np.ascontiguousarray(x)
    y = memory.empty(x.shape)
    _forward(_SOFTMAX, Layout.of(x), 1)(x, y)
    chosen = y[places]
    tiny = np.flatnonzero(chosen < _TINY)
    log_chosen = np.log(np.maximum(chosen, _TINY))
    if tiny.size:
        _, log_sums = _softmax_rows_by_numpy(x[tiny])
        log_chosen[tiny] = x[tiny, labels[tiny]] - log_sums
    return y, log_chosen


def _have_largest(x: Array) -> bool:
    """Return whether each row has a largest number, so that oneDNN computes its softmax. Local."""
    sums = np.empty((len(x), 1), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        multiply_into(x, np.ones((x.shape[1], 1), np.float32), sums)
    # The product takes less time, but what it finds may be minus infinity, or finite numbers whose sum is not.
    return bool(np.isfinite(sums).all() or np.isfinite(x.max(axis=1)).all())


def _softmax_rows_by_numpy(x: Array) -> tuple[Array, Array]:
    """Return the softmax of each row, and the logarithm of each row's sum of exponentials, ``(rows,)``. Local."""
    y, log_sums = memory.empty(x.shape), np.empty((len(x), 1), np.float32)
    for block in _blocks(*x.shape):
        given, out = x[block], y[block]
        largest = given.max(axis=1, keepdims=True)
        np.subtract(given, largest, out=out)
        np.exp(out, out=out)
        sums = out.sum(axis=1, keepdims=True)
        np.divide(out, sums, out=out)
        np.log(sums, out=sums)
        np.add(largest, sums, out=log_sums[block])
    return y, log_sums[:, 0]


@kept
def _forward(algorithm: int, x: Layout, axis: int) -> Operation:
    return Operation("softmax_forward", [TRAINING, algorithm, x, x, axis], [(SRC, x)], [(DST, x)])


@kept
def _backward(algorithm: int, y: Layout, axis: int) -> Operation:
    hint = Description("softmax_forward", [TRAINING, algorithm, y, y, axis])
    inputs = [(DST, y), (DIFF_DST, y)]
    parameters = [algorithm, y, y, y, axis, hint]
    return Operation("softmax_backward", parameters, inputs, [(DIFF_SRC, y)])


@kept
def _scale(rows: int, columns: int) -> Operation:
    matrix, factors = Layout.dense((rows, columns)), Layout.dense((rows, 1))
    inputs = [(SRC, matrix), (SECOND_SRC, factors)]
    return Operation("binary", [PRODUCT, matrix, factors, matrix], inputs, [(DST, matrix)])


def _scale_rows(matrix: Array, factors: Array, out: Array) -> None:
    """Write the rows of a C-contiguous matrix times a factor for each row into another one. Local."""
    factors = np.ascontiguousarray(factors)[:, None]
    if replacements.uses_onednn():
        _scale(*matrix.shape)(matrix, factors, out)
        return
    for block in _blocks(*matrix.shape):
        np.multiply(matrix[block], factors[block], out=out[block])


def _is_worth_it(array: Array, axis: int) -> bool:
    """Return whether oneDNN is faster than NumPy, which it is where the values of a softmax are side by side. Local.

    Along another axis, it has nothing but its reference implementation, which takes up to a hundred times as long.
    """
    if array.size < layouts.FEW or not layouts.is_suitable(array):
        return False
    if not -array.ndim <= axis < array.ndim:
        return False
    if layouts.in_memory_order(array) is None:  # it is copied
        return int(axis) % array.ndim == array.ndim - 1
    return bool(array.strides[axis] == array.itemsize)


def _can_differentiate(y: Array, gy: Array, axis: int) -> bool:
    """Return whether oneDNN computes a gradient faster than NumPy: of gradients, it has more only for AVX-512. Local."""
    is_known = library().has_avx512() and _is_worth_it(y, axis)
    return is_known and layouts.is_suitable(gy) and y.shape == gy.shape


def _in_order(array: Array) -> Array:
    return array if layouts.in_memory_order(array) is not None else np.ascontiguousarray(array)


def _softmax(algorithm: int, x: Array, axis: int) -> Array | None:
    """Return the softmax or its logarithm as a new array, or None if oneDNN cannot compute it. Local."""
    if not _is_worth_it(x, axis):
        return None
    x = _in_order(x)
    if not layouts.is_finite(x):  # oneDNN computes wrong results from NaN and infinity
        return None
    y = memory.empty_like(x)
    _forward(algorithm, Layout.of(x), int(axis) % x.ndim)(x, y)
    return y


def _softmax_gradient(algorithm: int, y: Array, gy: Array, axis: int) -> Array:
    y = _in_order(y)
    gy, gx = layouts.gradients_like(y, gy)
    _backward(algorithm, Layout.of(y), int(axis) % y.ndim)(y, gy, gx)
    return gx


@replaces(Softmax, "forward")
def _softmax_forward(chainers: Any, self: Any, inputs: tuple[Array]) -> Any:
    y = _softmax(_SOFTMAX, inputs[0], self.axis)
    if y is None:
        return chainers(self, inputs)
    self.retain_outputs((0,))
    return (y,)


@replaces(_SoftmaxGrad, "forward", needs_onednn=False)
def _softmax_backward(chainers: Any, self: Any, inputs: tuple[Array, Array]) -> Any:
    y, gy = inputs
    if replacements.uses_onednn() and _can_differentiate(y, gy, self.axis):
        gx = _softmax_gradient(_SOFTMAX, y, gy, self.axis)
    elif self.axis in (-1, y.ndim - 1) and y.shape == gy.shape and layouts.is_suitable(y, gy):
        gx = gy - np.einsum("...i,...i->...", y, gy)[..., None]
        gx *= y
    else:
        return chainers(self, inputs)
    self.retain_inputs((0, 1))
    return (gx,)


@replaces(LogSoftmax, "forward")
def _log_softmax_forward(chainers: Any, self: Any, inputs: tuple[Array]) -> Any:
    (x,) = inputs
    y = _softmax(_LOG_SOFTMAX, x, self.axis)
    if y is None:
        return chainers(self, inputs)
    self._x_xp, self._x_shape, self._x_dtype = np, x.shape, x.dtype
    self.retain_outputs((0,))
    return (y,)


@replaces(LogSoftmaxGrad, "forward")
def _log_softmax_backward(chainers: Any, self: Any, inputs: tuple[Array, Array]) -> Any:
    y, gy = inputs
    if not _can_differentiate(y, gy, self.axis) or not layouts.is_finite(y):
        return chainers(self, inputs)
    self.retain_inputs((0, 1))
    return (_softmax_gradient(_LOG_SOFTMAX, y, gy, self.axis),)


def _softmax_of_images(x: Array) -> tuple[Array, Array]:
    """Return the softmax over channels, and the logarithm of the sum of exponentials at each position. Local.

    Args:
        x: C-contiguous array of shape ``(n, channels, positions)``, float32.

    Returns:
        New C-contiguous arrays of shape ``(n, channels, positions)`` and ``(n, 1, positions)``, float32.
    """
    y = memory.empty_like(x)
    log_sums = np.empty((len(x), 1, x.shape[2]), np.float32)
    for image, block in itertools.product(range(len(x)), _blocks(x.shape[2], x.shape[1])):
        given, out = x[image, :, block], y[image, :, block]
        largest = given.max(axis=0)
        np.subtract(given, largest, out=out)
        np.exp(out, out=out)
        sums = out.sum(axis=0)
        np.divide(out, sums, out=out)
        np.log(sums, out=sums)
        np.add(largest, sums, out=log_sums[image, 0, block])
    return y, log_sums


def _images(x: Array) -> Array:
    """Return an array as ``(n, channels, positions)``, C-contiguous: a view or a copy. Local."""
    if replacements.uses_onednn() and layouts.is_channels_last(x):
        x, last = memory.empty(x.shape), x
        onednn.reorder(last, x)
    return np.ascontiguousarray(x).reshape(*x.shape[:2], -1)


@replaces(SoftmaxCrossEntropy, "forward_cpu", needs_onednn=False)
def _cross_entropy(chainers: Any, self: Any, inputs: tuple[Array, Array]) -> Any:
    x, t = inputs
    if (
        x.size < layouts.FEW
        or self.class_weight is not None
        or x.ndim < 2  # noqa: PLR2004 - a matrix, or images
        or not self.cache_score
        or not layouts.is_suitable(x)
        or not isinstance(t, np.ndarray)
        or t.shape != (*x.shape[:1], *x.shape[2:])
    ):
        return chainers(self, inputs)
    self.retain_inputs((0, 1))
    if chainer.is_debug():
        _check_input_values(x, t, self.ignore_label)
    counts = t != self.ignore_label
    labels = t * counts
    if x.ndim == 2:  # noqa: PLR2004 - a matrix
        self.y, log_p = softmax_rows(x, labels)
    else:
        images = _images(x)
        y, log_sums = _softmax_of_images(images)
        self.y = y.reshape(x.shape)
        chosen = np.take_along_axis(images, labels.reshape(log_sums.shape), axis=1)
        log_p = (chosen - log_sums).reshape(t.shape)
    log_p = log_p * counts
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
        x.size < layouts.FEW
        or self.soft_target
        or self.class_weight is not None
        or self.y is None
        or not self.y.flags.c_contiguous
        or gloss.dtype != np.float32
        or gloss.shape != (t.shape if self.coeff is None else ())
        or not layouts.is_suitable(x, self.y)
    ):
        return chainers(self, inputs)
    counts = t != self.ignore_label
    scale = gloss if self.coeff is None else gloss * np.float32(self.coeff)
    factors = np.broadcast_to(scale * counts.astype(np.float32), t.shape)
    labels = t * counts
    gx = memory.empty(self.y.shape)
    if x.ndim == 2:  # noqa: PLR2004 - a matrix
        _scale_rows(self.y, factors, gx)
        gx[np.arange(len(t)), labels] -= factors
        return (gx,)
    images = gx.reshape(*x.shape[:2], -1)
    each = factors.reshape(len(x), 1, -1)
    np.multiply(self.y.reshape(images.shape), each, out=images)
    places = labels.reshape(each.shape)
    chosen = np.take_along_axis(images, places, axis=1)
    np.put_along_axis(images, places, chosen - each, axis=1)
    # The functions before it get the order of their results, in which they need no copies.
    is_last = replacements.uses_onednn() and layouts.is_channels_last(x)
    return (layouts.channels_last(gx) if is_last else gx,)
