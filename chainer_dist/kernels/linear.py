"""Fully connected layers and ``F.matmul`` by oneDNN, where it is faster than the BLAS of NumPy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from chainer.functions.connection.linear import LinearFunction, LinearGradData, LinearGradWeight
from chainer.functions.math.matmul import MatMul

from chainer_dist.kernels import layouts, replacements
from chainer_dist.kernels.matrices import are_many, multiply
from chainer_dist.kernels.replacements import replaces

if TYPE_CHECKING:
    from chainer_dist.kernels.layouts import Array

# Chainer computes gradients with this value of the setting ``use_ideep``. Its default would disable kernels there.
_ALLOWED = "auto"


def _is_worth_it(a: Array, b: Array, *biases: Array) -> bool:
    return (
        a.ndim == b.ndim > 1
        and a.shape[-1] == b.shape[-2]
        and all(each.shape == b.shape[-1:] for each in biases)
        and are_many(a, b)
        and layouts.is_suitable(a, b, *biases)
    )


@replaces(LinearFunction, "forward")
def _linear(chainers: Any, self: Any, inputs: tuple[Array, ...]) -> Any:
    x, w, *biases = inputs
    # A static graph records Chainer's own calls.
    if not _is_worth_it(x, w.T, *biases) or replacements.is_recorded():
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
