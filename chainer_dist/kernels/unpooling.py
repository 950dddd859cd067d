"""Unpooling, and upsampling by the indexes of maxima, in NumPy, without Chainer's copies into columns."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from chainer.functions.pooling.unpooling_2d import Unpooling2D, Unpooling2DGrad
from chainer.functions.pooling.unpooling_nd import UnpoolingND, UnpoolingNDGrad
from chainer.functions.pooling.upsampling_2d import Upsampling2D, Upsampling2DGrad
from chainer.utils.conv import get_conv_outsize, get_deconv_outsize

from chainer_dist.kernels import layouts
from chainer_dist.kernels.replacements import replaces

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainer_dist.kernels.layouts import Array


class _Axis(NamedTuple):
    """A dimension along which each value of a small array has a window of a large one.

    Attributes:
        small: Number of windows.
        size: Size of a window.
        stride: Distance of windows.
        pad: Number of places of the first window before the beginning of the large array.
        large: Size of the large array.
    """

    small: int
    size: int
    stride: int
    pad: int
    large: int

    def places(self, offset: int) -> tuple[slice, slice]:
        """Return the windows whose place at an offset is inside the large array, and these places. Local."""
        first = max(0, -((offset - self.pad) // self.stride))
        last = min(self.small - 1, (self.large - 1 + self.pad - offset) // self.stride)
        begin = first * self.stride - self.pad + offset
        end = last * self.stride - self.pad + offset
        if last < first:
            return slice(0), slice(0)
        return slice(first, last + 1), slice(begin, end + 1, self.stride)

    def overlaps(self) -> bool:
        """Return whether windows share places. Local."""
        return self.stride < self.size

    def covers(self) -> bool:
        """Return whether each place of the large array is in exactly one window. Local."""
        ends = self.pad >= 0 and self.large + self.pad <= self.small * self.stride
        return self.stride == self.size and ends

    def along(self, ndim: int, dimension: int, places: slice) -> tuple[slice, ...]:
        """Return the index of an array that selects places along one dimension. Local."""
        return tuple(places if i == dimension else slice(None) for i in range(ndim))


def _axes(
    function: Any, small: Sequence[int], large: Sequence[int | None] | None = None
) -> list[_Axis]:
    """Return the axes of one of Chainer's functions. Local.

    Args:
        function: The function.
        small: Sizes of the small array, without batch and channels.
        large: Sizes of the large array; None for those that Chainer computes.
    """
    if hasattr(function, "kh"):
        windows = [(function.kh, function.sy, function.ph), (function.kw, function.sx, function.pw)]
    else:
        windows = list(zip(function.ksize, function.stride, function.pad))
    return [
        _Axis(n, *each, out or get_deconv_outsize(n, *each, function.cover_all))
        for n, each, out in zip(small, windows, large or [None] * len(windows))
    ]


def _axes_of_gradient(function: Any, large: Sequence[int]) -> list[_Axis]:
    return [
        axis._replace(
            small=get_conv_outsize(n, axis.size, axis.stride, axis.pad, function.cover_all)
        )
        for n, axis in zip(large, _axes(function, large, large))
    ]


def _are_usual(axes: Sequence[_Axis], *arrays: Array) -> bool:
    """Return whether arrays are suitable, and each window begins inside the large array. Local."""
    return layouts.is_suitable(*arrays) and all(
        axis.large > 0 and axis.small > 0 and 0 <= axis.pad < axis.size for axis in axes
    )


def is_shortened(axes: Sequence[_Axis]) -> bool:
    """Return whether Chainer repeats values here and drops some, which its gradient does not match. Local."""
    return any(axis.pad for axis in axes) and all(
        axis.pad % 2 == 0 and axis.large == axis.size * (axis.small - axis.pad) for axis in axes
    )


def _in_memory(array: Array) -> tuple[Array, int]:
    """Return a C-contiguous view or copy, and the index of its first dimension after batch and channels. Local."""
    if array.flags.c_contiguous or not layouts.is_channels_last(array):
        return np.ascontiguousarray(array), 2
    return layouts.to_last(array), 1


def _spread(x: Array, axes: Sequence[_Axis]) -> Array:
    """Return a large array: at each place the sum of the values whose windows have that place. Local."""
    y, first = _in_memory(x)
    # The last dimension is the first to grow, while there are few values.
    for dimension, axis in reversed(list(enumerate(axes, first))):
        x = y
        shape = (*x.shape[:dimension], axis.large, *x.shape[dimension + 1 :])
        y = np.empty(shape, x.dtype) if axis.covers() else np.zeros(shape, x.dtype)
        for offset in range(axis.size):
            given, places = (axis.along(x.ndim, dimension, p) for p in axis.places(offset))
            if axis.overlaps():
                y[places] += x[given]
            else:
                y[places] = x[given]
    return y if first > 1 else layouts.to_second(y)


def _gather(gy: Array, axes: Sequence[_Axis]) -> Array:
    """Return a small array: for each window the sum of its values. Local."""
    gx, first = _in_memory(gy)
    for dimension, axis in enumerate(axes, first):
        gy = gx
        shape = (*gy.shape[:dimension], axis.small, *gy.shape[dimension + 1 :])
        gx = np.zeros(shape, gy.dtype)
        for offset in range(axis.size):
            given, places = (axis.along(gy.ndim, dimension, p) for p in axis.places(offset))
            gx[given] += gy[places]
    return gx if first > 1 else layouts.to_second(gx)


@replaces(Unpooling2D, "forward", needs_onednn=False)
def _unpooling_2d(chainers: Any, self: Any, inputs: tuple[Array]) -> Any:
    (x,) = inputs
    axes = _axes(self, x.shape[2:], (self.outh, self.outw))
    if not _are_usual(axes, x) or is_shortened(axes):
        return chainers(self, inputs)
    self.outh, self.outw = (axis.large for axis in axes)
    return (_spread(x, axes),)


@replaces(UnpoolingND, "forward", needs_onednn=False)
def _unpooling_nd(chainers: Any, self: Any, inputs: tuple[Array]) -> Any:
    (x,) = inputs
    axes = _axes(self, x.shape[2:], self.outs)
    if not _are_usual(axes, x):
        return chainers(self, inputs)
    self.retain_inputs(())
    self.outs = tuple(axis.large for axis in axes)
    return (_spread(x, axes),)


@replaces(Unpooling2DGrad, "forward", needs_onednn=False)
@replaces(UnpoolingNDGrad, "forward", needs_onednn=False)
def _unpooling_gradient(chainers: Any, self: Any, inputs: tuple[Array]) -> Any:
    (gy,) = inputs
    axes = _axes_of_gradient(self, gy.shape[2:])
    if getattr(self, "_use_int_scale_forward", False) or not _are_usual(axes, gy):
        return chainers(self, inputs)
    return (_gather(gy, axes),)


def _windows(axes: Sequence[_Axis]) -> tuple[list[int], tuple[Any, ...], tuple[Any, ...]]:
    """Return the sizes of an array of all windows, and indexes of its overlap with the large array. Local.

    The first index is of the array of all windows, the second one of the large array.
    """
    sizes = [(axis.small - 1) * axis.stride + axis.size for axis in axes]
    ends = [min(size - axis.pad, axis.large) for size, axis in zip(sizes, axes)]
    part = (slice(axis.pad, axis.pad + end) for axis, end in zip(axes, ends))
    return sizes, (..., *part), (..., *map(slice, ends))


def _positions(indexes: Array, axes: Sequence[_Axis], strides: Sequence[int]) -> Array:
    """Return the positions in memory of the values at given places of windows. Local.

    Args:
        indexes: Numbers of places in their windows, of shape ``(batch, channels, height, width)``.
        axes: Axes of the windows.
        strides: Strides of a float32 array of all windows, in bytes.
    """
    steps = [stride // np.dtype(np.float32).itemsize for stride in strides]
    offsets = np.ix_(*(np.arange(axis.size) * step for axis, step in zip(axes, steps[2:])))
    positions: Array = np.ravel(sum(offsets))[indexes]
    counts = zip(indexes.shape, steps, (1, 1, *(axis.stride for axis in axes)))
    begins = np.ix_(*(np.arange(n) * step * stride for n, step, stride in counts))
    positions += begins[0] + begins[1]
    positions += begins[2] + begins[3]
    return positions


def _zeros(like: Array, sizes: Sequence[int]) -> tuple[Array, Array]:
    """Return zeros in the memory order of an array, and a 1-dimensional view of them. Local.

    Args:
        like: Array of shape ``(batch, channels, ...)``.
        sizes: Sizes of the zeros, without batch and channels.
    """
    n, channels, *_ = like.shape
    row = np.zeros(n * channels * math.prod(sizes), np.float32)
    if layouts.is_channels_last(like):
        return layouts.to_second(row.reshape(n, *sizes, channels)), row
    return row.reshape(n, channels, *sizes), row


@replaces(Upsampling2D, "forward_cpu", needs_onednn=False)
def _upsampling(chainers: Any, self: Any, inputs: tuple[Array]) -> Any:
    (x,) = inputs
    axes = _axes(self, x.shape[2:], (self.outh, self.outw))
    if not _are_usual(axes, x) or not isinstance(self.indexes, np.ndarray):
        return chainers(self, inputs)
    self._in_dtype = x.dtype
    outs = self.outh, self.outw = [axis.large for axis in axes]
    sizes, part, those = _windows(axes)
    windows, row = _zeros(x, sizes)
    positions = _positions(self.indexes, axes, windows.strides)
    if any(axis.overlaps() for axis in axes):
        np.add.at(row, positions, x)
    else:
        row[positions] = x
    if sizes == outs and not any(axis.pad for axis in axes):
        return (windows,)
    y, _ = _zeros(x, outs)
    y[those] = windows[part]
    return (y,)


@replaces(Upsampling2DGrad, "forward_cpu", needs_onednn=False)
def _upsampling_gradient(chainers: Any, self: Any, inputs: tuple[Array]) -> Any:
    (gy,) = inputs
    axes = _axes_of_gradient(self, gy.shape[2:])
    if (
        not _are_usual(axes, gy)
        or not isinstance(self.indexes, np.ndarray)
        or self.indexes.shape[2:] != tuple(axis.small for axis in axes)
    ):
        return chainers(self, inputs)
    sizes, part, those = _windows(axes)
    windows, row = _zeros(gy, sizes)
    windows[part] = gy[those]
    gx: Array = row[_positions(self.indexes, axes, windows.strides)]
    return (gx,)
