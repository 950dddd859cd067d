"""Channels last in memory: the layout in which convolutions and their neighbours need no reordering.

An array keeps its shape, (batch, channels, sizes...); the values of all channels at one position lie side by side.
NumPy's elementwise functions keep that order, so that it spreads through a network by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    Array = np.ndarray[Any, Any]


def is_suitable(*arrays: Any) -> bool:
    """Return whether all are plain, aligned float32 arrays of at least one value. Local."""
    return all(
        type(array) is np.ndarray
        and array.dtype.char == "f"
        and array.dtype.isnative
        and array.size > 0
        and array.flags.aligned
        for array in arrays
    )


def is_channels_last(array: Array) -> bool:
    """Return whether the channels of an array of at least 2 dimensions lie side by side, without gaps. Local."""
    return to_last(array).flags.c_contiguous


def to_last(array: Array) -> Any:
    """Return the array with its channels as the last dimension, a view. Local."""
    return array.transpose(0, *range(2, array.ndim), 1)


def to_second(array: Array) -> Any:
    """Return the array with its last dimension as the second, a view. Local."""
    return array.transpose(0, array.ndim - 1, *range(1, array.ndim - 1))


def empty(shape: Sequence[int]) -> Array:
    """Return a new float32 array of (batch, channels, sizes...) with channels last in memory. Local."""
    n, c, *sizes = shape
    return to_second(np.empty((n, *sizes, c), np.float32))


def channels_last(array: Array) -> Array:
    """Return the array itself if its channels are last in memory, or a copy with them so. Local."""
    if is_channels_last(array):
        return array
    copy = empty(array.shape)
    copy[...] = array
    return copy
