"""Statistics of the channels of an array, and arithmetic with one number per channel, by oneDNN or in NumPy.

Batch normalization with statistics of several arrays is made of these operations.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from chainer_dist.kernels import layouts, replacements
from chainer_dist.kernels.cache import kept
from chainer_dist.kernels.matrices import multiply_matrices
from chainer_dist.kernels.onednn import (
    BACKWARD,
    DIFF_DST,
    DIFF_SCALE,
    DIFF_SHIFT,
    DIFF_SRC,
    DST,
    INFERENCE,
    MEAN,
    SCALE,
    SCALE_AND_SHIFT,
    SHIFT,
    SRC,
    TRAINING,
    USE_GIVEN_STATISTICS,
    VARIANCE,
    Description,
    Layout,
    Operation,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chainer_dist.kernels.layouts import Array

# Number of values of one channel that are summed in float32, before such sums are added in float64.
_SUMMED = 8192

# Number of values in one pass, which stay in the cache.
_BLOCK = 1 << 18

# Number of values below which calls of oneDNN cost more than the passes over memory that they save.
_FEW = 1 << 17

_EPS = 1e-5  # any positive number will do: it keeps quotients finite


def of(x: Array, axis: Sequence[int], dtype: Any) -> Channels:
    """Return the channels of an array, computed by oneDNN where that is faster than NumPy. Local.

    Args:
        x: Array of any float dtype and layout.
        axis: Axes that are not axes of channels, ascending.
        dtype: Dtype of the computation, float32 or wider.
    """
    if (
        replacements.may_use_onednn()
        and dtype == np.float32
        and x.ndim > 1
        and x.size >= _FEW
        and tuple(axis) == (0, *range(2, x.ndim))
        and layouts.is_suitable(x)
        and layouts.is_channels_last(x)
    ):
        return _ChannelsByOneDNN(x, axis, dtype)
    return Channels(x, axis, dtype)


class Channels:
    """The channels of an array, in NumPy. Its methods are local.

    Means, sums, scales and shifts are float64, of the shape of the channels.

    Args:
        x: Array of any float dtype and layout, which is not changed.
        axis: Axes that are not axes of channels, ascending.
        dtype: Dtype of the computation, float32 or wider.
    """

    def __init__(self, x: Array, axis: Sequence[int], dtype: Any) -> None:
        self._x = x
        self._dtype = dtype
        self._dims = [i for i in range(x.ndim) if i not in axis]
        self._expand = tuple(None if i in axis else slice(None) for i in range(x.ndim))
        self._count = math.prod(x.shape[i] for i in axis)
        self._kept: tuple[Array, Array] | None = None  # the last deviation, for the next method

    def moments(self) -> tuple[Array, Array]:
        """Return the means, and the sums of squared deviations from them. The array must not be empty."""
        mean = self._sum(self._x.astype(self._dtype, copy=False)) / self._count
        center, deviation = self._kept = self._deviation(mean)
        # The center is the rounded mean. The mean's small distance from it is computed with fewer digits lost.
        rest = self._sum(deviation) / self._count
        squares = self._sum(deviation, deviation) - self._count * rest * rest
        return center + rest, np.maximum(squares, 0)

    def normalize(self, mean: Array, scale: Array, shift: Array) -> Array:
        """Return (x - mean) * scale + shift as a new array, in the dtype of the computation."""
        center, y = self._kept or self._deviation(mean)
        self._kept = None
        y *= self._per_channel(scale)
        y += self._per_channel(shift + (center - mean) * scale)
        return y

    def products(self, gy: Array, mean: Array, scale: Array) -> tuple[Array, Array, Array]:
        """Return gy * scale as a new array, and the sums of gy and of gy * (x - mean)."""
        gy = gy.astype(self._dtype, copy=False)
        center, deviation = self._kept = self._deviation(mean)
        sums = self._sum(gy)
        products = self._sum(gy, deviation) + sums * (center - mean)
        return gy * self._per_channel(scale), sums, products

    def add_normalized(self, to: Array, mean: Array, scale: Array, shift: Array) -> None:
        """Add (x - mean) * scale + shift in place to an array that :meth:`products` returned."""
        to += self.normalize(mean, scale, shift)

    def _deviation(self, mean: Array) -> tuple[Array, Array]:
        """Return the rounded mean, and the deviation of x from it as a new array."""
        center = mean.astype(self._dtype)
        return center, self._x - center[self._expand]

    def _sum(self, *arrays: Array) -> Array:
        """Return the product of arrays, summed over the axes in float64; blocks are summed in the arrays' dtype."""
        dims = list(range(arrays[0].ndim))
        operands = [operand for array in arrays for operand in (array, dims)]
        length = arrays[0].shape[0]
        step = max(1, length * _SUMMED // max(self._count, 1))
        if 0 not in self._dims and step < length:
            total = np.zeros([arrays[0].shape[i] for i in self._dims])
            for start in range(0, length, step):
                operands[::2] = [array[start : start + step] for array in arrays]
                total += np.einsum(*operands, self._dims)
            return total
        sums: Array = np.einsum(*operands, self._dims)
        return sums.astype(np.float64)

    def _per_channel(self, values: Array) -> Array:
        """Return float64 values of channels in the dtype of the computation, in a shape that broadcasts to x."""
        expanded: Array = values.astype(self._dtype)[self._expand]
        return expanded


def _layouts(rows: int, channels: int) -> tuple[Layout, Layout]:
    """Return the layout of rows, which oneDNN takes for one image, and of one number per channel. Local."""
    return Layout.channels_last((1, channels, rows, 1)), Layout.flat(channels)


@kept
def measure(rows: int, channels: int) -> Operation:
    """Return an operation that normalizes. Local.

    It reads x, of shape ``(rows, channels)``, and writes normalized values, means and biased variances.
    """
    x, each = _layouts(rows, channels)
    outputs = [(DST, x), (MEAN, each), (VARIANCE, each)]
    return Operation("batch_normalization_forward", [TRAINING, x, x, _EPS, 0], [(SRC, x)], outputs)


@kept
def normalize(rows: int, channels: int) -> Operation:
    """Return an operation that normalizes by given statistics. Local.

    It reads x, of shape ``(rows, channels)``, means, variances, scales and shifts, and writes the result.
    """
    x, each = _layouts(rows, channels)
    inputs = [(SRC, x), (MEAN, each), (VARIANCE, each), (SCALE, each), (SHIFT, each)]
    parameters = [INFERENCE, x, x, 0.0, SCALE_AND_SHIFT | USE_GIVEN_STATISTICS]
    return Operation("batch_normalization_forward", parameters, inputs, [(DST, x)])


@kept
def multiply(rows: int, channels: int) -> Operation:
    """Return an operation that multiplies gradients. Local.

    It reads x and gradients, of shape ``(rows, channels)``, with means, variances and scales of channels. It writes
    gradients times scales, and for each channel the sum of gradients times normalized x, and the sum of gradients.
    """
    x, each = _layouts(rows, channels)
    flags = SCALE_AND_SHIFT | USE_GIVEN_STATISTICS
    hint = Description("batch_normalization_forward", [TRAINING, x, x, 0.0, flags])
    inputs = [(SRC, x), (MEAN, each), (VARIANCE, each), (DIFF_DST, x), (SCALE, each)]
    outputs = [(DIFF_SRC, x), (DIFF_SCALE, each), (DIFF_SHIFT, each)]
    parameters = [BACKWARD, x, x, x, 0.0, flags, hint]
    return Operation("batch_normalization_backward", parameters, inputs, outputs)


class _ChannelsByOneDNN(Channels):
    """The channels of an array, by oneDNN's batch normalization, some rows at a time.

    Where statistics are given, eps is 0 and the variance 1, so that scale and shift alone decide.

    Args:
        x: Array of float32, with channels last in memory.
        axis: All axes but the second.
        dtype: float32.
    """

    def __init__(self, x: Array, axis: Sequence[int], dtype: Any) -> None:
        super().__init__(x, axis, dtype)
        self._rows = layouts.rows(x)
        self._ones = np.ones(x.shape[1], np.float32)

    def _blocks(self) -> Iterator[slice]:
        step = max(1, min(_SUMMED, _BLOCK // self._rows.shape[1]))
        return (slice(low, low + step) for low in range(0, len(self._rows), step))

    def moments(self) -> tuple[Array, Array]:
        """Return the means, and the sums of squared deviations from them. The array must not be empty."""
        blocks = [self._rows[block] for block in self._blocks()]
        n, channels = blocks[0].shape
        counts = np.array([len(block) for block in blocks])[:, None]
        means, variances, sums = np.empty((3, len(blocks), channels), np.float32)
        normalized, ones = np.empty_like(blocks[0]), np.ones((1, n), np.float32)
        for block, mean, variance, total in zip(blocks, means, variances, sums):
            n = len(block)
            measure(n, channels)(block, normalized[:n], mean, variance)
            multiply_matrices(ones[:, :n], normalized[:n], total[None])
        # The means are rounded, so the normalized values have means other than zero, which are corrected here.
        rest = sums * np.sqrt(variances + np.float64(_EPS)) / counts
        squares = counts * np.maximum(variances - rest * rest, 0)
        exact = means + rest
        mean = (counts * exact).sum(0) / self._count
        deviation = exact - mean
        return mean, (squares + counts * deviation * deviation).sum(0)

    def normalize(self, mean: Array, scale: Array, shift: Array) -> Array:
        """Return (x - mean) * scale + shift as a new array."""
        y = np.empty_like(self._x)
        self._normalize_into(self._rows, layouts.rows(y), self._numbers(mean, scale, shift))
        return y

    def products(self, gy: Array, mean: Array, scale: Array) -> tuple[Array, Array, Array]:
        """Return gy * scale as a new array, and the sums of gy and of gy * (x - mean)."""
        if not layouts.is_suitable(gy):
            gy = np.array(gy, np.float32)  # a copy is aligned
        gx = np.empty_like(self._x)
        given, made = layouts.rows(layouts.channels_last(gy)), layouts.rows(gx)
        center, factor = mean.astype(np.float32), scale.astype(np.float32)
        products, sums = np.empty((2, len(center)), np.float32)
        of_x, of_gy = np.zeros((2, len(center)))
        for block in self._blocks():
            rows = self._rows[block]
            numbers = (center, self._ones, given[block], factor)
            multiply(*rows.shape)(rows, *numbers, made[block], products, sums)
            of_x += products
            of_gy += sums
        return gx, of_gy, of_x + of_gy * (center - mean)

    def add_normalized(self, to: Array, mean: Array, scale: Array, shift: Array) -> None:
        """Add (x - mean) * scale + shift in place to an array that :meth:`products` returned."""
        rows, numbers = layouts.rows(to), self._numbers(mean, scale, shift)
        added = None
        for block in self._blocks():
            x = self._rows[block]
            added = np.empty_like(x) if added is None else added[: len(x)]
            self._normalize_into(x, added, numbers)
            rows[block] += added

    def _numbers(self, mean: Array, scale: Array, shift: Array) -> tuple[Array, ...]:
        center = mean.astype(np.float32)
        shift = shift + (center - mean) * scale
        return center, self._ones, scale.astype(np.float32), shift.astype(np.float32)

    @staticmethod
    def _normalize_into(x: Array, y: Array, numbers: tuple[Array, ...]) -> None:
        normalize(*x.shape)(x, *numbers, y)
