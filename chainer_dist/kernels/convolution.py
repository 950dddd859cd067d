"""Convolutions and transposed convolutions of up to three dimensions, and their gradients, by oneDNN.

A transposed convolution is the gradient of a convolution with respect to its input, and Chainer computes that
gradient as one. So ``convolution_backward_data`` of oneDNN serves both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from chainer.functions.connection.convolution_2d import Convolution2DFunction, Convolution2DGradW
from chainer.functions.connection.convolution_nd import ConvolutionND, ConvolutionNDGradW
from chainer.functions.connection.deconvolution_2d import Deconvolution2DFunction
from chainer.functions.connection.deconvolution_nd import DeconvolutionND
from chainer.utils.conv import get_conv_outsize

from chainer_dist.kernels import layouts, memory, winograd
from chainer_dist.kernels.cache import kept
from chainer_dist.kernels.geometry import DIRECT, MOST_DIMENSIONS, Geometry, Window
from chainer_dist.kernels.matrices import multiply
from chainer_dist.kernels.onednn import (
    BIAS,
    DIFF_DST,
    DIFF_SRC,
    DIFF_WEIGHTS,
    DST,
    SRC,
    WEIGHTS,
    Description,
    Layout,
    Operation,
)
from chainer_dist.kernels.replacements import replaces
from chainer_dist.kernels.shared_library import library

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainer_dist.kernels.layouts import Array


@kept
def _forward(geometry: Geometry, has_bias: bool) -> Operation:
    bias = Layout.flat(geometry.w[0]) if has_bias else None
    inputs = [(SRC, _given(geometry)), (WEIGHTS, Layout.dense(geometry.weights()))]
    if bias:
        inputs.append((BIAS, bias))
    outputs = [(DST, Layout.channels_last(geometry.y))]
    return Operation("convolution_forward", geometry.forward(bias), inputs, outputs)


@kept
def _backward_data(geometry: Geometry) -> Operation:
    x, y = Layout.channels_last(geometry.x), Layout.channels_last(geometry.y)
    weights = Layout.dense(geometry.weights())
    hint = Description("convolution_forward", geometry.forward())
    parameters = [DIRECT, x, weights.anyhow(), y, *geometry.sizes(), hint]
    inputs, outputs = [(DIFF_DST, y), (WEIGHTS, weights)], [(DIFF_SRC, x)]
    return Operation("convolution_backward_data", parameters, inputs, outputs)


@kept
def _backward_weights(geometry: Geometry) -> Operation:
    inputs = [(SRC, _given(geometry)), (DIFF_DST, Layout.channels_last(geometry.y))]
    outputs = [(DIFF_WEIGHTS, Layout.dense(geometry.weights()))]
    # With channels last, it takes up to four times as long on processors without AVX-512.
    any_layouts = geometry.window.groups == 1 and not library().has_avx512()
    forward = geometry.forward(any_layouts=any_layouts)
    _, algorithm, x, weights, _, y, *sizes = forward
    hint = Description("convolution_forward", forward)
    parameters = [algorithm, x, weights, None, y, *sizes, hint]
    return Operation("convolution_backward_weights", parameters, inputs, outputs)


def _given(geometry: Geometry) -> Layout:
    return (Layout.dense if geometry.x_is_dense else Layout.channels_last)(geometry.x)


def _input(x: Array) -> tuple[Array, bool]:
    """Return an array that oneDNN can read, and whether it is C-contiguous instead of channels last. Local."""
    if x.flags.c_contiguous and not layouts.is_channels_last(x):
        return x, True
    return layouts.channels_last(x), False


def _is_product(
    window: Window, x_sizes: Sequence[int], w_sizes: Sequence[int], y_sizes: Sequence[int]
) -> bool:
    """Return whether a convolution is a product of matrices: of the channels at positions by the weights. Local.

    A product reads the weights where they are, while oneDNN's convolution would reorder them.
    """
    stride, pad, _, groups = window
    are_inside = all(s * (y - 1) < x for s, y, x in zip(stride, y_sizes, x_sizes))
    return {*w_sizes, groups} == {1} and not any(pad) and are_inside


def _seen(x: Array, y_sizes: Sequence[int], window: Window) -> Any:
    """Return what windows of one position see of ``x``, channels last: (n, sizes of y..., channels), a view. Local."""
    places = (slice(0, s * (size - 1) + 1, s) for s, size in zip(window.stride, y_sizes))
    seen = slice(None), *places
    return layouts.to_last(x)[seen]


def convolve(
    x: Array,
    w: Array,
    b: Array | None,
    y_sizes: Sequence[int],
    window: Window,
) -> Array:
    """Return a convolution as a new array, with channels last in memory. Local.

    Args:
        x: Input of shape ``(n, c, sizes...)``, float32.
        w: Weights of shape ``(out_c, c / groups, sizes...)``, float32.
        b: Biases of shape ``(out_c,)``, float32; None for zeros.
        y_sizes: Sizes of the output, without batch and channels.
        window: Stride, padding, dilation and groups.
    """
    x, is_dense = _input(x)
    if not is_dense and _is_product(window, x.shape[2:], w.shape[2:], y_sizes):
        seen = _seen(x, y_sizes, window).reshape(-1, x.shape[1])
        rows = multiply(seen, w.reshape(w.shape[:2]).T, b)
        product: Array = layouts.to_second(rows.reshape(len(x), *y_sizes, len(w)))
        return product
    y = None if is_dense else winograd.convolve(x, w, b, y_sizes, window)
    if y is not None:
        return y
    y = layouts.empty((x.shape[0], w.shape[0], *y_sizes))
    geometry = Geometry(x.shape, w.shape, y.shape, window, is_dense)
    bias = () if b is None else (np.ascontiguousarray(b),)
    _forward(geometry, b is not None)(x, np.ascontiguousarray(w), *bias, y)
    return y


def transposed(
    y: Array,
    w: Array,
    b: Array | None,
    x_sizes: Sequence[int],
    window: Window,
) -> Array:
    """Return a transposed convolution as a new array, with channels last in memory. Local.

    Args:
        y: Input of shape ``(n, c, sizes...)``, float32.
        w: Weights of shape ``(c, out_c / groups, sizes...)``, float32.
        b: Biases of shape ``(out_c,)``, float32; None for zeros.
        x_sizes: Sizes of the output, without batch and channels.
        window: Stride, padding, dilation and groups.
    """
    y = layouts.channels_last(y)
    x = winograd.transposed(y, w, b, x_sizes, window)
    if x is not None:
        return x
    if _is_product(window, x_sizes, w.shape[2:], y.shape[2:]):
        rows = multiply(layouts.rows(y), w.reshape(w.shape[:2]))
        x = layouts.to_second(rows.reshape(len(y), *y.shape[2:], w.shape[1]))
        if x.shape[2:] != tuple(x_sizes):
            product = layouts.to_last(x)
            x = layouts.to_second(np.zeros((len(y), *x_sizes, w.shape[1]), np.float32))
            _seen(x, y.shape[2:], window)[...] = product
    else:
        x = layouts.empty((y.shape[0], w.shape[1] * window.groups, *x_sizes))
        geometry = Geometry(x.shape, w.shape, y.shape, window)
        _backward_data(geometry)(y, np.ascontiguousarray(w), x)
    if b is not None:
        layouts.to_last(x)[...] += b
    return x


def gradient_of_weights(
    x: Array,
    y: Array,
    w_sizes: Sequence[int],
    window: Window,
) -> Array:
    """Return the gradient of a convolution with respect to its weights, as a new C-contiguous array. Local.

    Args:
        x: Input of the convolution, of shape ``(n, c, sizes...)``, float32.
        y: Gradient with respect to its output, of shape ``(n, out_c, sizes...)``, float32.
        w_sizes: Sizes of the weights, without channels.
        window: Stride, padding, dilation and groups.
    """
    x, is_dense = _input(x)
    y = layouts.channels_last(y)
    if not is_dense and _is_product(window, x.shape[2:], w_sizes, y.shape[2:]):
        seen = _seen(x, y.shape[2:], window).reshape(-1, x.shape[1])
        return multiply(layouts.rows(y).T, seen).reshape(y.shape[1], x.shape[1], *w_sizes)
    w = None if is_dense else winograd.gradient_of_weights(x, y, w_sizes, window)
    if w is not None:
        return w
    w = memory.empty((y.shape[1], x.shape[1] // window.groups, *w_sizes))
    geometry = Geometry(x.shape, w.shape, y.shape, window, is_dense)
    _backward_weights(geometry)(x, y, w)
    return w


def _y_sizes(
    x: Array, w_sizes: Sequence[int], window: Window, cover_all: bool
) -> tuple[int, ...] | None:
    """Return the sizes of the output, or None if only Chainer's own code can compute it, or refuse. Local."""
    stride, pad, dilate, _ = window
    if len(w_sizes) != x.ndim - 2 or x.ndim - 2 > MOST_DIMENSIONS or min(pad) < 0:
        return None
    sizes = zip(x.shape[2:], w_sizes, stride, pad, dilate)
    y_sizes = tuple(get_conv_outsize(n, k, s, p, cover_all, d) for n, k, s, p, d in sizes)
    return y_sizes if min(y_sizes) > 0 else None


def _can_convolve(x: Array, w: Array, b: Array | None, groups: int) -> bool:
    divides = x.shape[1] == w.shape[1] * groups and w.shape[0] % groups == 0
    fits = b is None or (layouts.is_suitable(b) and b.shape == w.shape[:1])
    return layouts.is_suitable(x, w) and divides and fits


def _can_transpose(y: Array, w: Array, b: Array | None, window: Window) -> bool:
    biases = () if b is None else (b,)
    divides = y.shape[1] == w.shape[0] and w.shape[0] % window.groups == 0
    return layouts.is_suitable(y, w, *biases) and divides and min(window.pad) >= 0


def _convolve(function: Any, x: Array, w: Array, b: Array | None) -> Any:
    """Return the outputs of one of Chainer's functions, or None if only Chainer's own code can compute them. Local."""
    window = Window.of(function)
    y_sizes = _y_sizes(x, w.shape[2:], window, function.cover_all)
    if y_sizes is None or not _can_convolve(x, w, b, function.groups):
        return None
    return (convolve(x, w, b, y_sizes, window),)


def _gradient_of_weights(function: Any, x: Array, gy: Array, w_sizes: Sequence[int]) -> Any:
    """Return the outputs of one of Chainer's gradients, or None if only Chainer's own code can compute them. Local."""
    window = Window.of(function)
    y_sizes = _y_sizes(x, w_sizes, window, function.cover_all)
    if (
        y_sizes is None
        or (*gy.shape[:1], *gy.shape[2:]) != (len(x), *y_sizes)
        or not layouts.is_suitable(x, gy)
        or function.W_dtype != np.float32
    ):
        return None
    return (gradient_of_weights(x, gy, w_sizes, window),)


@replaces(Convolution2DFunction, "_forward_cpu_core")
@replaces(Convolution2DFunction, "_forward_grouped_convolution")
def _convolution_2d(chainers: Any, self: Any, x: Array, W: Array, b: Array | None) -> Any:
    return _convolve(self, x, W, b) or chainers(self, x, W, b)


@replaces(Convolution2DGradW, "_forward_cpu_core")
@replaces(Convolution2DGradW, "_forward_grouped_convolution")
def _convolution_2d_gradient(chainers: Any, self: Any, x: Array, gy: Array) -> Any:
    return _gradient_of_weights(self, x, gy, (self.kh, self.kw)) or chainers(self, x, gy)


@replaces(Deconvolution2DFunction, "_forward_cpu_core")
@replaces(Deconvolution2DFunction, "_forward_grouped_convolution")
def _deconvolution_2d(chainers: Any, self: Any, x: Array, W: Array, b: Array | None) -> Any:
    window = Window.of(self)
    if not _can_transpose(x, W, b, window):
        return chainers(self, x, W, b)
    return (transposed(x, W, b, (self.outh, self.outw), window),)


@replaces(ConvolutionND, "_forward_xp")
def _convolution_nd(chainers: Any, self: Any, *inputs: Any) -> Any:
    x, W, b, _ = inputs
    return _convolve(self, x, W, b) or chainers(self, *inputs)


@replaces(ConvolutionNDGradW, "_forward_xp")
def _convolution_nd_gradient(chainers: Any, self: Any, x: Array, gy: Array, xp: Any) -> Any:
    return _gradient_of_weights(self, x, gy, self.ksize) or chainers(self, x, gy, xp)


@replaces(DeconvolutionND, "_forward_xp")
def _deconvolution_nd(chainers: Any, self: Any, *inputs: Any) -> Any:
    x, W, b, _ = inputs
    window = Window.of(self)
    if not _can_transpose(x, W, b, window) or self.ndim > MOST_DIMENSIONS:
        return chainers(self, *inputs)
    return (transposed(x, W, b, self.outs, window),)
