"""Products of matrices by oneDNN, where it beats the BLAS of NumPy: fully connected layers and F.matmul."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import chainer
import numpy as np
from chainer.functions.connection.linear import LinearFunction, LinearGradData, LinearGradWeight

from chainer_dist.kernels import layouts
from chainer_dist.kernels.onednn import DST, SRC, WEIGHTS, Layout, Operation, kept
from chainer_dist.kernels.replacements import replaces

if TYPE_CHECKING:
    from chainer_dist.kernels.layouts import Array

# Below so many multiplications the call costs more than it saves.
_FEW = 1 << 16


@kept
def _multiply(a: Layout, b: Layout) -> Operation:
    y = Layout.dense((*a.shape[:-1], b.shape[-1]))
    return Operation("matmul", [a, b, None, y], [(SRC, a), (WEIGHTS, b)], [(DST, y)])


def multiply(a: Array, b: Array) -> Array:
    """Return the product of two matrices, or of two stacks of as many matrices, new, C-contiguous. Local.

    Args:
        a: (..., m, k), float32; in its last two dimensions C- or Fortran-contiguous, or any other layout
            at the price of a copy.
        b: (..., k, n) likewise.
    """
    a, b = _matrices(a), _matrices(b)
    y = np.empty((*a.shape[:-1], b.shape[-1]), np.float32)
    _multiply(Layout.of(a), Layout.of(b))(a, b, y)
    return y


def _matrices(array: Array) -> Array:
    """Return the array itself if oneDNN can multiply it as it lies, or a copy. Local."""
    rows, columns = array.strides[-2:]
    lies_well = array.itemsize in (rows, columns) and min(array.strides) > 0
    return array if lies_well else np.ascontiguousarray(array)


def _is_worth_it(a: Array, b: Array) -> bool:
    return layouts.is_suitable(a, b) and a.size * b.shape[-1] >= _FEW


@replaces(LinearFunction, "forward")
def _linear(chainers: Any, self: Any, inputs: tuple[Array, ...]) -> Any:
    x, w, *biases = inputs
    # A static graph records Chainer's own calls.
    if chainer.config.schedule_func is not None or not _is_worth_it(x, w.T):
        return chainers(self, inputs)
    self._config_use_ideep = chainer.config.use_ideep
    self.retain_inputs((0, 1))
    y = multiply(x, w.T)
    for b in biases:
        y += b
    return (y,)


@replaces(LinearGradData, "forward")
def _linear_gradient_of_input(chainers: Any, self: Any, inputs: tuple[Array, Array]) -> Any:
    w, gy = inputs
    if not _is_worth_it(gy, w):
        return chainers(self, inputs)
    self._config_use_ideep = chainer.config.use_ideep
    self.retain_inputs((0, 1))
    return (multiply(gy, w),)


@replaces(LinearGradWeight, "forward")
def _linear_gradient_of_weights(chainers: Any, self: Any, inputs: tuple[Array, Array]) -> Any:
    x, gy = inputs
    if self._w_dtype != np.float32 or not _is_worth_it(gy.T, x):
        return chainers(self, inputs)
    self._config_use_ideep = chainer.config.use_ideep
    self.retain_inputs((0, 1))
    return (multiply(gy.T, x),)
