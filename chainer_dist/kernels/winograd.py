"""Convolutions by windows of 3 by 3 with a quarter of the multiplications, by Winograd's algorithm.

A tile of 4 by 4 outputs takes 36 multiplications for each pair of channels instead of 144: it is the sum over channels
of 36 products of transformed inputs and transformed weights, transformed back (Lavin and Gray, 2016, "Fast algorithms
for convolutional neural networks", https://arxiv.org/abs/1509.09308, whose names B, G and A are used here). For all
tiles and channels, these are 36 products of matrices. The transformations are convolutions of single channels and
products with small matrices. oneDNN computes all of them, while its own convolutions are direct.

The rounding errors are about five times those of the direct way. A value that is NaN or infinite would spread to its
whole tile. So a result that is not finite is given up, and computed directly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from chainer_dist.kernels import layouts, memory
from chainer_dist.kernels.cache import kept
from chainer_dist.kernels.geometry import Geometry, Window
from chainer_dist.kernels.matrices import multiply, multiply_matrices
from chainer_dist.kernels.onednn import DST, SRC, WEIGHTS, Layout, Operation
from chainer_dist.kernels.shared_library import library

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chainer_dist.kernels.layouts import Array

_WINDOW = 3  # sizes of the window
_TILE = 4  # sizes of a tile of the output
_REACH = _TILE + _WINDOW - 1  # sizes of what a tile sees of the input
_N_PRODUCTS = _REACH**2

# The polynomials are evaluated at these points, at 0 and at infinity. The rounding error is a third of that with 1 and
# 2, as of the points that are exact and symmetric these are close to the best ones.
_P, _Q = 0.75, 1.5


class _Row(NamedTuple):
    """Row of a matrix: where its first factor is, the distance of its factors, and the factors themselves."""

    first: int
    step: int
    factors: tuple[float, ...]


_CENTER = _P**2 * _Q**2, -(_P**2) - _Q**2, 1.0
# B transposed: products of (x - point) for all other points.
_OF_INPUT = (
    _Row(0, 2, _CENTER),
    *(
        _Row(1, 1, (-point * other**2, -(other**2), point, 1.0))
        for point, other in ((_P, _Q), (-_P, _Q), (_Q, _P), (-_Q, _P))
    ),
    _Row(1, 2, _CENTER),
)
_A = np.array([[1, 0, 0, 0], *([1, p, p**2, p**3] for p in (_P, -_P, _Q, -_Q)), [0, 0, 0, 1]])
_OF_GRADIENT = tuple(_Row(0, 1, tuple(row)) for row in _A.tolist())
_DIVISORS = 1 / _CENTER[0], 0.5 / (_P**4 - (_P * _Q) ** 2), 0.5 / (_Q**4 - (_P * _Q) ** 2)
_G = np.array(
    [
        [_DIVISORS[0], 0, 0],
        *(_DIVISORS[1] * np.array([1, p, p**2]) for p in (_P, -_P)),
        *(_DIVISORS[2] * np.array([1, p, p**2]) for p in (_Q, -_Q)),
        [0, 0, 1],
    ]
)
# Columns come before rows in the transformed values of a tile.
_TO_WEIGHTS = np.einsum("jb,ia->jiab", _G, _G).reshape(_N_PRODUCTS, -1).astype(np.float32)
_TO_FLIPPED_WEIGHTS = np.ascontiguousarray(_TO_WEIGHTS[:, ::-1])
_TO_OUTPUT = np.einsum("jb,ia->abji", _A, _A).reshape(-1, _N_PRODUCTS).astype(np.float32)

# Values of the input that are transformed together: with the results, they should fit into the cache.
_BLOCK = 1 << 19

# The fewest channels for which the multiplications that are saved outweigh the transformations, as C K / (C + K) of the
# channels C of the input and K of the output, where tiles cover no more than the output.
_FEWEST_CHANNELS = 56
_FEWEST_CHANNELS_OF_GRADIENT, _FEWEST_WITH_AVX512 = 32, 40
# The fewest positions of the output for which the same is true of the transformation of the weights.
_FEWEST_POSITIONS = 512
# Most pairs of channels, whose transformed weights take 150 MB.
_MOST_PAIRS = 1 << 20


class _Block(NamedTuple):
    """Tiles that are computed together: of some images, from one row of tiles to another."""

    images: slice
    first: int
    last: int


def _blocks(n: int, tiles: tuple[int, int], channels: int) -> Iterator[_Block]:
    """Yield blocks of whole images, or of rows of tiles of one image, which are about equally large. Local."""
    rows, columns = tiles
    per_image = rows * columns * channels * _TILE**2
    images = _BLOCK // per_image
    if images > 1:
        for start in range(0, n, images):
            yield _Block(slice(start, start + images), 0, rows)
        return
    parts = min(rows, -(-per_image // _BLOCK))
    bounds = [rows * part // parts for part in range(parts + 1)]
    for image in range(n):
        for first, last in zip(bounds, bounds[1:]):
            yield _Block(slice(image, image + 1), first, last)


@kept
def _combine(x: tuple[int, ...], size: int, axis: int, pad: int, row: _Row) -> Operation:
    """Return the operation that combines rows (axis 0) or columns (1) of images, one for each tile. Local.

    Args:
        x: Shape of the images, ``(n, channels, height, width)``.
        size: Number of tiles along the axis.
        axis: Axis of the images.
        pad: Number of zeros before the images.
        row: What to combine.
    """
    first, step, factors = row
    if pad < first:  # the window begins with zeros, as the padding cannot be negative
        padded = np.zeros((first - pad) + step * (len(factors) - 1) + 1)
        padded[first - pad :: step] = factors
        first, step, factors = pad, 1, tuple(padded)
    y, window = list(x), [1, 1]
    y[axis + 2], window[axis] = size, len(factors)
    stride, padding, dilation = [1, 1], [0, 0], [1, 1]
    stride[axis], padding[axis], dilation[axis] = _TILE, pad - first, step
    channels = x[1]
    sizes = Window(tuple(stride), tuple(padding), tuple(dilation), channels)
    geometry = Geometry(x, (channels, 1, *window), tuple(y), sizes)
    weights = np.empty(geometry.weights(), np.float32)
    weights[...] = np.reshape(factors, window)
    inputs = [(SRC, Layout.channels_last(x)), (WEIGHTS, Layout.dense(weights.shape))]
    outputs = [(DST, Layout.channels_last(geometry.y))]
    operation = Operation("convolution_forward", geometry.forward(), inputs, outputs)
    operation.hold(1, weights)
    return operation


def _transform(
    x: Array, matrix: Sequence[_Row], block: _Block, columns: int, pad: Sequence[int]
) -> Array:
    """Return the transformed values of a block, of shape ``(36, tiles, channels)``. Local.

    Args:
        x: Images of shape ``(n, height, width, channels)``, C-contiguous.
        matrix: Matrix that transforms the rows and columns of each tile.
        block: Tiles to transform.
        columns: Number of tiles of a row.
        pad: Numbers of rows and columns of zeros before the images.
    """
    start, stop = block.first * _TILE - pad[0], block.last * _TILE - pad[0]
    beyond = max(row.first + row.step * (len(row.factors) - 1) for row in matrix) + 1 - _TILE
    seen = x[block.images, max(0, start) : stop + beyond]
    n, height, width, channels = seen.shape
    tiles = block.last - block.first
    rows = memory.empty((len(matrix), n, tiles, width, channels))
    shape = (n, channels, height, width)
    for row, result in zip(matrix, rows):
        _combine(shape, tiles, 0, max(0, -start), row)(seen, result)
    values = memory.empty((len(matrix), len(matrix), n, tiles, columns, channels))
    shape = (len(matrix) * n, channels, tiles, width)
    for row, result in zip(matrix, values):
        _combine(shape, columns, 1, pad[1], row)(rows, result)
    return values.reshape(_N_PRODUCTS, -1, channels)


def _tiles(sizes: Sequence[int]) -> tuple[int, int]:
    """Return how many rows and columns of tiles cover an output of some height and width. Local."""
    height, width = sizes
    return -(-height // _TILE), -(-width // _TILE)


def _suits(
    x: Sequence[int], w: Sequence[int], y: Sequence[int], window: Window, *, fewest: int
) -> bool:
    """Return whether a convolution can be computed in this way, and is faster so. Local.

    Args:
        x: Shape of the input, ``(n, c, height, width)``.
        w: Shape of the weights, ``(out_c, c, height, width)``.
        y: Shape of the output.
        window: Stride, padding, dilation and groups.
        fewest: The fewest channels for which it is faster.
    """
    if tuple(w[2:]) != (_WINDOW, _WINDOW) or window.groups != 1 or w[0] * w[1] > _MOST_PAIRS:
        return False
    if {*window.stride, *window.dilate} != {1} or max(window.pad) >= _WINDOW:
        return False
    if any(b != a + 2 * pad - _WINDOW + 1 for a, b, pad in zip(x[2:], y[2:], window.pad)):
        return False
    (rows, columns), positions = _tiles(y[2:]), y[2] * y[3]
    are_many = w[0] * w[1] * positions >= fewest * (w[0] + w[1]) * rows * columns * _TILE**2
    return are_many and y[0] * positions >= _FEWEST_POSITIONS


def convolve(
    x: Array, w: Array, b: Array | None, y_sizes: Sequence[int], window: Window
) -> Array | None:
    """Return a convolution as a new array with channels last, or None if it is to be computed directly. Local.

    Args:
        x: Input of shape ``(n, c, sizes...)``, float32, with channels last in memory.
        w: Weights of shape ``(out_c, c / groups, sizes...)``, float32.
        b: Biases of shape ``(out_c,)``, float32; None for zeros.
        y_sizes: Sizes of the output, without batch and channels.
        window: Stride, padding, dilation and groups.
    """
    y_shape = (x.shape[0], w.shape[0], *y_sizes)
    if not _suits(x.shape, w.shape, y_shape, window, fewest=_FEWEST_CHANNELS):
        return None
    weights = _transformed_weights(w, _TO_WEIGHTS)
    return _convolve(x, weights.transpose(0, 2, 1), b, y_sizes, window.pad)


def transposed(
    y: Array, w: Array, b: Array | None, x_sizes: Sequence[int], window: Window
) -> Array | None:
    """Return a transposed convolution, likewise. Local.

    Args:
        y: Input of shape ``(n, c, sizes...)``, float32, with channels last in memory.
        w: Weights of shape ``(c, out_c / groups, sizes...)``, float32.
        b: Biases of shape ``(out_c,)``, float32; None for zeros.
        x_sizes: Sizes of the output, without batch and channels.
        window: Stride, padding, dilation and groups.
    """
    x_shape = (y.shape[0], w.shape[1] * window.groups, *x_sizes)
    if not _suits(x_shape, w.shape, y.shape, window, fewest=_FEWEST_CHANNELS):
        return None
    weights = _transformed_weights(w, _TO_FLIPPED_WEIGHTS)
    return _convolve(y, weights, b, x_sizes, [_WINDOW - 1 - each for each in window.pad])


def _transformed_weights(w: Array, matrix: Array) -> Array:
    """Return weights of shape ``(36, w.shape[0], w.shape[1])``. Local."""
    weights = memory.empty((_N_PRODUCTS, *w.shape[:2]))
    values = np.ascontiguousarray(w).reshape(-1, _WINDOW**2)
    multiply_matrices(matrix, values.T, weights.reshape(_N_PRODUCTS, -1))
    return weights


def _convolve(
    x: Array, weights: Array, b: Array | None, y_sizes: Sequence[int], pad: Sequence[int]
) -> Array | None:
    """Return a convolution by transformed weights of shape ``(36, c, out_c)``, or None if it is not finite. Local."""
    n, (_, c, out_c) = len(x), weights.shape
    tiles = _tiles(y_sizes)
    images, y = layouts.to_last(x), memory.empty((n, *y_sizes, out_c))
    with np.errstate(over="ignore", invalid="ignore"):
        for block in _blocks(n, tiles, max(c, out_c)):
            values = multiply(_transform(images, _OF_INPUT, block, tiles[1], pad), weights)
            outputs = multiply(_TO_OUTPUT, values.reshape(_N_PRODUCTS, -1))
            shape = (_TILE, _TILE, -1, block.last - block.first, tiles[1], out_c)
            part = y[block.images, block.first * _TILE : block.last * _TILE]
            for i, row in enumerate(outputs.reshape(shape)):
                for j, output in enumerate(row):
                    target = part[:, i::_TILE, j::_TILE]
                    inside = output[:, : target.shape[1], : target.shape[2]]
                    if b is None:
                        target[...] = inside
                    else:
                        np.add(inside, b, out=target)
        return layouts.to_second(y) if np.isfinite(y.sum()) else None


def gradient_of_weights(x: Array, y: Array, w_sizes: Sequence[int], window: Window) -> Array | None:
    """Return the gradient with respect to the weights, C-contiguous, or None if it is to be computed directly. Local.

    Args:
        x: Input of the convolution, of shape ``(n, c, sizes...)``, float32, with channels last in memory.
        y: Gradient with respect to its output, of shape ``(n, out_c, sizes...)``, likewise.
        w_sizes: Sizes of the weights, without channels.
        window: Stride, padding, dilation and groups.
    """
    shape = (y.shape[1], x.shape[1] // window.groups, *w_sizes)
    is_wide = library().has_avx512()
    fewest = _FEWEST_WITH_AVX512 if is_wide else _FEWEST_CHANNELS_OF_GRADIENT
    if not _suits(x.shape, shape, y.shape, window, fewest=fewest):
        return None
    tiles = _tiles(y.shape[2:])
    images, gradients = layouts.to_last(x), layouts.to_last(y)
    with np.errstate(over="ignore", invalid="ignore"):
        products = _products(images, gradients, tiles, window.pad)
        total = next(products)
        for product in products:
            total += product
        w = multiply(total.reshape(_N_PRODUCTS, -1).T, _TO_WEIGHTS)
        return w.reshape(shape) if np.isfinite(w.sum()) else None


def _products(
    images: Array, gradients: Array, tiles: tuple[int, int], pad: Sequence[int]
) -> Iterator[Array]:
    """Yield the products of transformed gradients by transformed inputs, ``(36, out_c, c)``, of each block. Local."""
    channels = max(images.shape[-1], gradients.shape[-1])
    for block in _blocks(len(images), tiles, channels):
        inputs = _transform(images, _OF_INPUT, block, tiles[1], pad)
        outputs = _transform(gradients, _OF_GRADIENT, block, tiles[1], (0, 0))
        yield multiply(outputs.transpose(0, 2, 1), inputs)
