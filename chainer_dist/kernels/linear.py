"""Products of matrices by oneDNN, where it beats the BLAS of NumPy: fully connected layers and F.matmul."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import chainer
import numpy as np
from chainer.functions.connection.linear import LinearFunction, LinearGradData, LinearGradWeight
from chainer.functions.math.matmul import MatMul

from chainer_dist.kernels import layouts, onednn, replacements
from chainer_dist.kernels.onednn import BIAS, DST, SRC, WEIGHTS, Layout, Operation, kept
from chainer_dist.kernels.replacements import replaces

if TYPE_CHECKING:
    from chainer_dist.kernels.layouts import Array

# Chainer puts what it finds here into the configuration for the gradients; its default would refuse kernels there.
_ALLOWED = "auto"

# Up to so many multiplications OpenBLAS does not copy the matrices first, and the call costs more than it saves.
_FEW = 10**6
# The same of few rows by a transposed matrix.
_FEW_TRANSPOSED = 1 << 18
# Several threads of OpenBLAS would keep those of oneDNN from the cores for a while after a product.
_FEW_FOR_THREADS = 1 << 16

# Up to so many rows oneDNN's older way is faster whatever the second matrix is.
_FEW_ROWS = 12


@kept
def _multiply(a: Layout, b: Layout, has_bias: bool) -> Operation:
    y = Layout.dense((*a.shape[:-1], b.shape[-1]))
    bias = Layout.dense((*[1] * (len(b.shape) - 1), b.shape[-1])) if has_bias else None
    inputs = [(SRC, a), (WEIGHTS, b), *([(BIAS, bias)] if bias else [])]
    return Operation("matmul", [a, b, bias, y], inputs, [(DST, y)])


def multiply(a: Array, b: Array, bias: Array | None = None) -> Array:
    """Return the product of two matrices, or of two stacks of as many matrices, new, C-contiguous. Local.

    Of oneDNN's two ways the one is faster where the second matrix is transposed, or a bias is added; the other otherwise.

    Args:
        a: (..., m, k), float32; in its last two dimensions C- or Fortran-contiguous, or any other layout
            at the price of a copy.
        b: (..., k, n) likewise.
        bias: (n,), float32; None for zeros.
    """
    a, b = _matrices(a), _matrices(b)
    y = np.empty((*a.shape[:-1], b.shape[-1]), np.float32)
    rows_are_contiguous = onednn.matrix_order(b)[0] == b"N"
    if a.ndim == 2 and (len(a) <= _FEW_ROWS or (bias is None and rows_are_contiguous)):  # noqa: PLR2004 - matrices
        onednn.multiply_matrices(a, b, y)
        if bias is not None:
            y += bias
    else:
        biases = () if bias is None else (np.ascontiguousarray(bias),)
        _multiply(Layout.of(a), Layout.of(b), bias is not None)(a, b, *biases, y)
    return y


def multiply_into(a: Array, b: Array, y: Array, *, adds: bool = False) -> None:
    """Write the product of two float32 matrices into ``y`` by what is faster, with oneDNN or without it. Local.

    Args:
        a: (m, k), of any layout.
        b: (k, n) likewise.
        y: (m, n), C-contiguous.
        adds: Whether the product is added to what is in ``y``.
    """
    if replacements.uses_onednn() and _are_many(a, b):
        onednn.multiply_matrices(_matrices(a), _matrices(b), y, adds=adds)
    elif adds:
        y += a @ b
    else:
        np.matmul(a, b, out=y)


def _matrices(array: Array) -> Array:
    """Return the array itself if oneDNN can multiply it as it lies, or a copy. Local."""
    lies_well = onednn.matrix_order(array)[0] and min(array.strides) > 0
    return array if lies_well else np.ascontiguousarray(array)


def _is_worth_it(a: Array, b: Array, *biases: Array) -> bool:
    return _are_many(a, b) and layouts.is_suitable(a, b, *biases)


def _are_many(a: Array, b: Array) -> bool:
    """Return whether there are so many multiplications that oneDNN is faster than OpenBLAS. Local."""
    few = _FEW
    if onednn.n_threads() > 1:
        few = _FEW_FOR_THREADS
    elif 1 < a.shape[-2] <= _FEW_ROWS and b.strides[-2] < b.strides[-1]:
        few = _FEW_TRANSPOSED
    return bool(a.size * b.shape[-1] >= few)


@replaces(LinearFunction, "forward")
def _linear(chainers: Any, self: Any, inputs: tuple[Array, ...]) -> Any:
    x, w, *biases = inputs
    # A static graph records Chainer's own calls.
    if not _is_worth_it(x, w.T, *biases) or chainer.config.schedule_func is not None:
        return chainers(self, inputs)
    self._config_use_ideep = _ALLOWED
    self.retain_inputs((0, 1))
    return (multiply(x, w.T, *biases),)


@replaces(LinearGradData, "forward")
def _linear_gradient_of_input(chainers: Any, self: Any, inputs: tuple[Array, Array]) -> Any:
    w, gy = inputs
    if not _is_worth_it(gy, w):
        return chainers(self, inputs)
    self._config_use_ideep = _ALLOWED
    self.retain_inputs((0, 1))
    return (multiply(gy, w),)


@replaces(LinearGradWeight, "forward")
def _linear_gradient_of_weights(chainers: Any, self: Any, inputs: tuple[Array, Array]) -> Any:
    x, gy = inputs
    if self._w_dtype != np.float32 or not _is_worth_it(gy.T, x):
        return chainers(self, inputs)
    self._config_use_ideep = _ALLOWED
    self.retain_inputs((0, 1))
    return (multiply(gy.T, x),)


@replaces(MatMul, "forward")
def _matmul(chainers: Any, self: Any, inputs: tuple[Array, Array]) -> Any:
    a, b = inputs
    if (
        self.dtype not in (None, np.float32)
        or not layouts.is_suitable(a, b)
        or min(a.ndim, b.ndim) < 2  # noqa: PLR2004 - matrices
        or a.shape[:-2] != b.shape[:-2]
    ):
        return chainers(self, inputs)
    transa, transb = self.transa, self.transb
    if self.transc:
        a, b, transa, transb = b, a, not transb, not transa
    a = a.swapaxes(-1, -2) if transa else a
    b = b.swapaxes(-1, -2) if transb else b
    if not _is_worth_it(a, b):
        return chainers(self, inputs)
    self.retain_inputs((0, 1))
    return (multiply(a, b),)
