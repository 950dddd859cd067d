"""Channels last in memory: the layout with which convolutions and their neighbors need no reordering.

An array keeps its shape, ``(batch, channels, sizes...)``, while the values of all channels at one position are
adjacent. NumPy's elementwise functions keep that order, so a whole network comes to use it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from chainer_dist.kernels import memory, onednn
from chainer_dist.kernels.shared_library import n_threads

if TYPE_CHECKING:
    from collections.abc import Sequence

    Array = np.ndarray[Any, Any]


_FLOAT32 = np.dtype(np.float32)

# Number of values below which a call of oneDNN for an elementwise function costs more than the passes that it saves.
FEW = 4096

# Number of values from which oneDNN reorders them faster than NumPy.
_MANY = 1 << 14


def is_suitable(*arrays: Any) -> bool:
    """Return whether all are plain, aligned float32 arrays of 1 to 12 dimensions, not empty. Local."""
    for array in arrays:
        if type(array) is not np.ndarray or array.dtype != _FLOAT32 or not array.size:
            return False
        if not 0 < array.ndim <= onednn.MOST_DIMENSIONS or not array.flags.aligned:
            return False
    return True


def is_channels_last(array: Array) -> bool:
    """Return whether an array of 2 dimensions or more has channels last in memory, without gaps. Local."""
    return bool(to_last(array).flags.c_contiguous)


def to_last(array: Array) -> Any:
    """Return a view of an array with its channels as the last dimension. Local."""
    return array.transpose(0, *range(2, array.ndim), 1)


def to_second(array: Array) -> Any:
    """Return a view of an array with its last dimension as the second one. Local."""
    return array.transpose(0, array.ndim - 1, *range(1, array.ndim - 1))


def rows(array: Array) -> Any:
    """Return an array with channels last in memory as a matrix ``(positions, channels)``, a view. Local."""
    return to_last(array).reshape(-1, array.shape[1])


def gradients_like(known: Array, gy: Array) -> tuple[Array, Array]:
    """Return ``gy`` in the memory order of ``known``, and an array for the result, which may be the same. Local."""
    gx = memory.empty_like(known)
    if gy.strides == known.strides:
        return gy, gx
    gx[...] = gy
    return gx, gx  # oneDNN can write in place


def empty(shape: Sequence[int], dtype: Any = np.float32) -> Array:
    """Return a new array of shape ``(batch, channels, sizes...)`` with channels last in memory. Local."""
    n, c, *sizes = shape
    array: Array = to_second(memory.empty((n, *sizes, c), dtype))
    return array


def channels_last(array: Array) -> Array:
    """Return an array with channels last in memory: the array itself, or a copy that oneDNN may make. Local."""
    if is_channels_last(array):
        return array
    copy = empty(array.shape)
    if array.flags.c_contiguous and array.size >= _MANY and is_suitable(array):
        onednn.reorder(array, copy)
    else:
        copy_channels(array, copy)
    return copy


def copy_channels(source: Array, target: Array) -> None:
    """Copy to an array of the same shape, by all threads if both have channels last in memory. Local.

    There may be gaps between the channels of one position and those of the next.
    """
    are_many = source.size >= _MANY and n_threads() > 1  # one thread of NumPy is as fast
    if are_many and is_suitable(source, target) and _have_gaps_only(source, target):
        onednn.reorder(source, target)
    else:
        target[...] = source


def _have_gaps_only(*arrays: Array) -> bool:
    """Return whether arrays have channels last in memory, where gaps may be between positions. Local."""
    for array in map(to_last, arrays):
        outer = zip(array.strides, array.strides[1:], array.shape[1:])
        if array.strides[-1] != array.itemsize or any(a < n * b for a, b, n in outer):
            return False
    return True


def in_memory_order(array: Array) -> Array | None:
    """Return a 1-dimensional view of all values in their order in memory, or None if there are gaps. Local."""
    if array.flags.c_contiguous:
        return np.ravel(array)
    if array.ndim > 2 and is_channels_last(array):  # noqa: PLR2004 - batch and channels
        return np.ravel(to_last(array))
    return np.ravel(array.T) if array.flags.f_contiguous else None


def is_finite(array: Array) -> bool:
    """Return whether no value is NaN or infinite; False for an array with gaps in memory. Local."""
    row = in_memory_order(array)
    return row is not None and bool(np.isfinite(row.max()) and np.isfinite(row.min()))
