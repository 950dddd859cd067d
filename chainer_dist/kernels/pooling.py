"""Maximum and average pooling of up to three dimensions, and their gradients, by oneDNN."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from chainer.functions.pooling.average_pooling_2d import AveragePooling2D, AveragePooling2DGrad
from chainer.functions.pooling.average_pooling_nd import AveragePoolingND, AveragePoolingNDGrad
from chainer.functions.pooling.max_pooling_nd import MaxPoolingND, MaxPoolingNDGrad
from chainer.utils.conv import get_conv_outsize

from chainer_dist.kernels import layouts
from chainer_dist.kernels.cache import kept
from chainer_dist.kernels.geometry import MOST_DIMENSIONS, padding_at_end
from chainer_dist.kernels.matrices import multiply_matrices
from chainer_dist.kernels.onednn import (
    DIFF_DST,
    DIFF_SRC,
    DST,
    SRC,
    TRAINING,
    WORKSPACE,
    Description,
    Layout,
    Operation,
    dimensions,
)
from chainer_dist.kernels.replacements import replaces

if TYPE_CHECKING:
    from chainer_dist.kernels.layouts import Array

_MAX, _AVERAGE_WITH_PADDING, _AVERAGE_WITHOUT_PADDING = 0x1FF, 0x2FF, 0x3FF

_MOST_IN_A_BYTE = 255  # most values of a window whose indexes oneDNN stores in one byte each


class _Pooling(NamedTuple):
    """Key of the operation of a pooling.

    Attributes:
        algorithm: Constant of oneDNN.
        x: Shape of the input, ``(batch, channels, sizes...)``.
        y: Shape of the output, ``(batch, channels, sizes...)``.
        size: Sizes of the window.
        stride: Strides of the window.
        pad: Padding at the beginning.
    """

    algorithm: int
    x: tuple[int, ...]
    y: tuple[int, ...]
    size: tuple[int, ...]
    stride: tuple[int, ...]
    pad: tuple[int, ...]

    @classmethod
    def of(cls, algorithm: int, function: Any, x: tuple[int, ...]) -> _Pooling:
        """Return the key for one of Chainer's functions and an input of shape ``x``. Local."""
        if hasattr(function, "kh"):
            size, stride = (function.kh, function.kw), (function.sy, function.sx)
            pad, cover_all = (function.ph, function.pw), False
        else:
            size, stride, pad = function.ksize, function.stride, function.pad
            cover_all = function.cover_all
        sizes = zip(x[2:], size, stride, pad)
        y = tuple(get_conv_outsize(n, k, s, p, cover_all) for n, k, s, p in sizes)
        return cls(algorithm, x, (*x[:2], *y), tuple(size), tuple(stride), tuple(pad))

    def padding_at_end(self) -> tuple[int, ...]:
        """Return how far the last windows reach beyond the end of ``x``. Local."""
        together = [1] * len(self.size)
        return padding_at_end(self.x[2:], self.size, self.y[2:], self.stride, self.pad, together)

    def is_possible(self) -> bool:
        """Return whether oneDNN has the operation, as each window has a value of ``x``. Local."""
        ends = zip(self.size, self.pad, self.padding_at_end(), self.y[2:])
        return len(self.size) == len(self.x) - 2 <= MOST_DIMENSIONS and all(
            0 <= p < k and end < k and y > 0 for k, p, end, y in ends
        )

    def parameters(self) -> list[Any]:
        """Return the parameters that forward and backward have in common. Local."""
        between = [0] * len(self.size)
        sizes = (self.stride, self.size, between, self.pad, self.padding_at_end())
        return [
            Layout.channels_last(self.x),
            Layout.channels_last(self.y),
            *map(dimensions, sizes),
        ]

    def indexes(self) -> Any:
        """Return the dtype of the indexes of each window's largest value. Local."""
        return np.uint8 if np.prod(self.size) <= _MOST_IN_A_BYTE else np.int32


@kept
def _forward(pooling: _Pooling) -> Operation:
    outputs: list[tuple[int, Layout | None]] = [(DST, Layout.channels_last(pooling.y))]
    if pooling.algorithm == _MAX:
        outputs.append((WORKSPACE, None))
    inputs = [(SRC, Layout.channels_last(pooling.x))]
    parameters = [TRAINING, pooling.algorithm, *pooling.parameters()]
    return Operation("pooling_forward", parameters, inputs, outputs)


@kept
def _backward(pooling: _Pooling) -> Operation:
    hint = Description("pooling_forward", [TRAINING, pooling.algorithm, *pooling.parameters()])
    inputs: list[tuple[int, Layout | None]] = [(DIFF_DST, Layout.channels_last(pooling.y))]
    if pooling.algorithm == _MAX:
        inputs.append((WORKSPACE, None))
    parameters = [pooling.algorithm, *pooling.parameters(), hint]
    outputs = [(DIFF_SRC, Layout.channels_last(pooling.x))]
    return Operation("pooling_backward", parameters, inputs, outputs)


def _is_finite(x: Array) -> bool:
    """Return whether no value of an array with channels last in memory is NaN or infinite. Local."""
    rows = layouts.rows(x)
    sums = np.empty((1, rows.shape[1]), np.float32)
    # By all threads, and without NumPy's warnings of overflow.
    multiply_matrices(np.ones((1, len(rows)), np.float32), rows, sums)
    return bool(np.isfinite(sums).all()) or layouts.is_finite(x)  # sums may overflow


@replaces(MaxPoolingND, "forward_cpu")
def _max_pooling(chainers: Any, self: Any, inputs: tuple[Array]) -> Any:
    (x,) = inputs
    pooling = _Pooling.of(_MAX, self, x.shape)
    if not layouts.is_suitable(x) or not pooling.is_possible():
        return chainers(self, inputs)
    x = layouts.channels_last(x)
    # oneDNN ignores NaN, and replaces infinity by the largest number.
    if not _is_finite(x):
        return chainers(self, inputs)
    y = layouts.empty(pooling.y)
    # Index of each maximum within its window, which Chainer counts in the same way.
    self.indexes = layouts.empty(pooling.y, pooling.indexes())
    self._in_shape, self._in_dtype = x.shape, x.dtype
    _forward(pooling)(x, y, self.indexes)
    if self.return_indices:  # a script computes with them, and they would overflow
        self.indexes = self.indexes.astype(np.int64)
    return (y,)


@replaces(MaxPoolingNDGrad, "forward_cpu")
def _max_pooling_gradient(chainers: Any, self: Any, inputs: tuple[Array]) -> Any:
    (gy,) = inputs
    indexes = self.func.indexes
    pooling = _Pooling.of(_MAX, self.func, self.func._in_shape)
    if (
        not layouts.is_suitable(gy)
        or gy.shape != pooling.y
        or not pooling.is_possible()
        or not layouts.is_channels_last(indexes)
    ):
        return chainers(self, inputs)
    gx = layouts.empty(pooling.x)
    indexes = indexes.astype(pooling.indexes(), copy=False)
    _backward(pooling)(layouts.channels_last(gy), indexes, gx)
    return (gx,)


def _average_kind(function: Any) -> int:
    without = hasattr(function, "pad_value") and function.pad_value is None
    return _AVERAGE_WITHOUT_PADDING if without else _AVERAGE_WITH_PADDING


@replaces(AveragePooling2D, "forward_cpu")
@replaces(AveragePoolingND, "forward_cpu")
def _average_pooling(chainers: Any, self: Any, inputs: tuple[Array]) -> Any:
    (x,) = inputs
    pooling = _Pooling.of(_average_kind(self), self, x.shape)
    if not layouts.is_suitable(x) or not pooling.is_possible():
        return chainers(self, inputs)
    self._in_shape, self._in_dtype = x.shape, x.dtype
    if pooling.algorithm == _AVERAGE_WITHOUT_PADDING:  # Chainer's own gradient needs it
        self.width = self._get_pooling_width(np, x.shape[2:], x.dtype)
    y = layouts.empty(pooling.y)
    _forward(pooling)(layouts.channels_last(x), y)
    return (y,)


@replaces(AveragePooling2DGrad, "forward_cpu")
@replaces(AveragePoolingNDGrad, "forward_cpu")
def _average_pooling_gradient(chainers: Any, self: Any, inputs: tuple[Array]) -> Any:
    (gy,) = inputs
    function = getattr(self, "func", self)
    pooling = _Pooling.of(_average_kind(function), function, function._in_shape)
    if not layouts.is_suitable(gy) or gy.shape != pooling.y or not pooling.is_possible():
        return chainers(self, inputs)
    gx = layouts.empty(pooling.x)
    _backward(pooling)(layouts.channels_last(gy), gx)
    return (gx,)
