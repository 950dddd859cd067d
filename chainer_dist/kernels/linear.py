"""Fully connected layers and ``F.matmul`` by oneDNN, where it is faster than the BLAS of NumPy.

Their gradients are computed at once, without functions of their own, unless gradients of gradients are wanted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import chainer
import numpy as np
from chainer.functions.connection.linear import LinearFunction, LinearGradData, LinearGradWeight
from chainer.functions.math.matmul import MatMul

from chainer_dist.kernels import layouts, replacements
from chainer_dist.kernels.matrices import multiply_many, sum_of_rows
from chainer_dist.kernels.replacements import replaces
from chainer_dist.kernels.variables import variable

if TYPE_CHECKING:
    from chainer_dist.kernels.layouts import Array

# Chainer computes gradients with this value of the setting ``use_ideep``. Its default would disable kernels there.
_ALLOWED = "auto"


def _product(a: Array, b: Array) -> Array:
    """Return the product of two suitable matrices, by oneDNN or NumPy, whichever is faster. Local."""
    y = multiply_many(a, b) if replacements.uses_onednn() else None
    if y is None:
        y = a.dot(b)
    return y


@replaces(LinearFunction, "forward")
def _linear(chainers: Any, self: Any, inputs: tuple[Array, ...]) -> Any:
    x, w, *biases = inputs
    # A static graph records Chainer's own calls.
    y = None if replacements.is_recorded() else multiply_many(x, w.T, *biases)
    if y is None:
        return chainers(self, inputs)
    self._config_use_ideep = _ALLOWED
    self.retain_inputs((0, 1))
    return (y,)


@replaces(LinearFunction, "backward", needs_onednn=False)
def _linear_gradients(
    chainers: Any, self: Any, indexes: tuple[int, ...], grad_outputs: tuple[Any]
) -> Any:
    (gy,) = (each.array for each in grad_outputs)
    x, w = (node.data for node in self.inputs[:2])
    if chainer.config.enable_backprop or not layouts.is_suitable(x, w, gy):
        return chainers(self, indexes, grad_outputs)
    compute = (lambda: _product(gy, w), lambda: _product(gy.T, x), lambda: sum_of_rows(gy))
    return tuple(variable(compute[i]()) for i in indexes)


@replaces(LinearGradData, "forward")
def _linear_gradient_of_input(chainers: Any, self: Any, inputs: tuple[Array, Array]) -> Any:
    w, gy = inputs
    gx = multiply_many(gy, w)
    if gx is None:
        return chainers(self, inputs)
    self._config_use_ideep = _ALLOWED
    self.retain_inputs((0, 1))
    return (gx,)


@replaces(LinearGradWeight, "forward")
def _linear_gradient_of_weights(chainers: Any, self: Any, inputs: tuple[Array, Array]) -> Any:
    x, gy = inputs
    gw = multiply_many(gy.T, x) if self._w_dtype == np.float32 else None
    if gw is None:
        return chainers(self, inputs)
    self._config_use_ideep = _ALLOWED
    self.retain_inputs((0, 1))
    return (gw,)


@replaces(MatMul, "forward")
def _matmul(chainers: Any, self: Any, inputs: tuple[Array, Array]) -> Any:
    y = None
    if self.dtype in (None, np.float32):
        y = _multiply(*inputs, self.transa, self.transb, self.transc)
    if y is None:
        return chainers(self, inputs)
    self.retain_inputs((0, 1))
    return (y,)


@replaces(MatMul, "backward")
def _matmul_gradients(
    chainers: Any, self: Any, indexes: tuple[int, ...], grad_outputs: tuple[Any]
) -> Any:
    (gy,) = (each.array for each in grad_outputs)
    a, b = (node.data for node in self.inputs)
    # Gradients of what is broadcast are summed.
    if chainer.config.enable_backprop or a.shape[:-2] != b.shape[:-2]:
        return chainers(self, indexes, grad_outputs)
    gradients = []
    for i in indexes:
        if i:
            gradient = _multiply(a, gy, not self.transa, self.transc, self.transb)
        else:
            gradient = _multiply(gy, b, self.transc, not self.transb, self.transa)
        if gradient is None:
            return chainers(self, indexes, grad_outputs)
        gradients.append(variable(gradient))
    return tuple(gradients)


def _multiply(a: Array, b: Array, transa: bool, transb: bool, transc: bool) -> Array | None:
    """Return the product of two matrices or stacks of them, each transposed if asked for. Local.

    Returns:
        A new array, or None if Chainer's own code is to compute it.
    """
    if transc:
        a, b, transa, transb = b, a, not transb, not transa
    if min(a.ndim, b.ndim) < 2:  # noqa: PLR2004 - matrices
        return None
    a = a.swapaxes(-1, -2) if transa else a
    b = b.swapaxes(-1, -2) if transb else b
    if a.ndim != b.ndim:  # stacks are broadcast
        a = a.reshape(*[1] * (b.ndim - a.ndim), *a.shape)
        b = b.reshape(*[1] * (a.ndim - b.ndim), *b.shape)
    return multiply_many(a, b)
