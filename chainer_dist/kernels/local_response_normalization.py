"""Local response normalization over five channels by oneDNN.

Chainer's own code computes other windows and exponents, and everything on processors without AVX-512. There oneDNN 3.2
takes several times as long, or computes wrong gradients.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np
from chainer.functions.normalization.local_response_normalization import (
    LocalResponseNormalization,
    LocalResponseNormalizationGrad,
)

from chainer_dist.kernels import layouts
from chainer_dist.kernels.cache import kept
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
)
from chainer_dist.kernels.replacements import replaces
from chainer_dist.kernels.shared_library import library

if TYPE_CHECKING:
    from chainer_dist.kernels.layouts import Array

_ACROSS_CHANNELS = 0xAFF
_WINDOW = 5
_BETA = 0.75
_WORKSPACE_SIZE = 2  # in arrays of the size of the input

# oneDNN computes with the third power of k + alpha * sum of squares, which must be finite.
_LARGEST = float(np.finfo(np.float32).max) ** (1 / 3)


def _parameters(k: float, alpha: float) -> list[Any]:
    # oneDNN divides alpha by the size of the window.
    return [ctypes.c_int64(_WINDOW), _WINDOW * alpha, _BETA, k]


@kept
def _forward(shape: tuple[int, ...], k: float, alpha: float) -> Operation:
    x = Layout.channels_last(shape)
    parameters = [TRAINING, _ACROSS_CHANNELS, x, x, *_parameters(k, alpha)]
    return Operation("lrn_forward", parameters, [(SRC, x)], [(DST, x), (WORKSPACE, None)])


@kept
def _backward(shape: tuple[int, ...], k: float, alpha: float) -> Operation:
    x = Layout.channels_last(shape)
    more = _parameters(k, alpha)
    hint = Description("lrn_forward", [TRAINING, _ACROSS_CHANNELS, x, x, *more])
    inputs = [(SRC, x), (DIFF_DST, x), (WORKSPACE, None)]
    parameters = [_ACROSS_CHANNELS, x, x, x, *more, hint]
    return Operation("lrn_backward", parameters, inputs, [(DIFF_SRC, x)])


class _WhenAsked:
    """An intermediate result for Chainer's own gradient, computed only when NumPy converts it to an array. Local.

    Args:
        x: Input of forward, of shape ``(batch, channels, height, width)``.
        k: Constant that is added to the sums of squares.
        alpha: Factor of the sums.
        exponent: Exponent of the result.
    """

    def __init__(self, x: Array, k: float, alpha: float, exponent: float) -> None:
        self._x, self._k, self._alpha, self._exponent = x, k, alpha, exponent

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        """Return the result as a new array. Called by NumPy."""
        del copy
        squares = np.square(self._x)
        sums = squares.copy()
        for step in range(1, _WINDOW // 2 + 1):
            sums[:, step:] += squares[:, :-step]
            sums[:, :-step] += squares[:, step:]
        scale: Array = (self._k + self._alpha * sums) ** self._exponent
        return scale.astype(dtype or scale.dtype, copy=False)


def _is_possible(function: Any, *arrays: Array) -> bool:
    return (
        function.n // 2 == _WINDOW // 2
        and function.beta == _BETA
        and arrays[0].ndim == 4  # noqa: PLR2004 - images
        and layouts.is_suitable(*arrays)
        and library().has_avx512()
    )


@replaces(LocalResponseNormalization, "forward_cpu")
def _normalize(chainers: Any, self: Any, inputs: tuple[Array]) -> Any:
    (x,) = inputs
    if not _is_possible(self, x):
        return chainers(self, inputs)
    k, alpha = float(self.k), float(self.alpha)
    squares = _WINDOW * max(float(x.max()), -float(x.min())) ** 2  # at most; NaN if a value is
    if not abs(k) + abs(alpha) * squares < _LARGEST:
        return chainers(self, inputs)
    self.retain_inputs((0,))
    self.retain_outputs((0,))
    y = layouts.empty(x.shape)
    # Chainer passes these three attributes to the gradient.
    self.indexes = np.empty(_WORKSPACE_SIZE * x.size, np.float32)
    self.unit_scale = _WhenAsked(x, k, alpha, 1.0)
    self.scale = _WhenAsked(x, k, alpha, -_BETA)
    _forward(x.shape, k, alpha)(layouts.channels_last(x), y, self.indexes)
    return (y,)


@replaces(LocalResponseNormalizationGrad, "forward_cpu")
def _normalize_gradient(chainers: Any, self: Any, inputs: tuple[Array, Array, Array]) -> Any:
    x, _, gy = inputs
    if self.indexes is None or not _is_possible(self, x, gy) or gy.shape != x.shape:
        return chainers(self, inputs)
    gx = layouts.empty(x.shape)
    given = layouts.channels_last(x), layouts.channels_last(gy)
    _backward(x.shape, float(self.k), float(self.alpha))(*given, self.indexes, gx)
    return (gx,)
