"""New arrays at the beginning of a cache line, for the results of kernels.

NumPy's own begin at any multiple of 16 bytes. With AVX-512 nearly every load and store of such an array touches two lines:
a product by it takes up to an eighth longer, and writing it in one pass over memory up to a fifth.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from chainer_dist.kernels.onednn import address

if TYPE_CHECKING:
    from collections.abc import Sequence

    Array = np.ndarray[Any, Any]

__all__ = ["LINE", "at_line", "begins_line", "dense", "empty", "empty_in_order", "empty_like"]

LINE = 64  # bytes of a cache line, and of the widest registers

# Number of bytes of an array below which NumPy's own takes less time.
_FEW = 1 << 14


def begins_line(array: Array) -> bool:
    """Return whether an array begins at the beginning of a cache line. Local."""
    return _offset(array) == 0


def _offset(array: Array) -> int:
    """Return how many bytes of its first cache line are before an array. Local."""
    return (address(array).value or 0) % LINE


def empty(shape: Sequence[int], dtype: Any = np.float32) -> Array:
    """Return a new C-contiguous array without values, at the beginning of a cache line unless it is small. Local."""
    n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    if n_bytes < _FEW:
        return np.empty(shape, dtype)
    memory = np.empty(n_bytes + LINE, np.uint8)
    array: Array = np.ndarray(shape, dtype, memory, -_offset(memory) % LINE)
    return array


def empty_like(array: Array) -> Array:
    """Return the same with the shape, dtype and memory order of another array, without gaps. Local."""
    if array.flags.c_contiguous:
        return empty(array.shape, array.dtype)
    return empty_in_order(array.shape, array.strides, array.dtype)


def empty_in_order(shape: Sequence[int], strides: Sequence[int], dtype: Any) -> Array:
    """Return the same with the memory order of an array of these strides. Local."""
    axes = range(len(shape))
    order = sorted(axes, key=lambda axis: -abs(strides[axis]))
    made = empty([shape[axis] for axis in order], dtype)
    in_order: Array = made.transpose([order.index(axis) for axis in axes])
    return in_order


def dense(array: Array) -> Array:
    """Return a C-contiguous copy of an array, likewise. Local."""
    copy = empty(array.shape, array.dtype)
    copy[...] = array
    return copy


def at_line(array: Array) -> Array:
    """Return an array itself if it begins at a cache line or is small, or else a C-contiguous copy that does. Local."""
    if array.nbytes < _FEW or begins_line(array):
        return array
    return dense(array)
