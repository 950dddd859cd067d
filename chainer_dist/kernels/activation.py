"""Elementwise activations and their gradients, in fewer passes over memory.

The forward pass of ReLU is two maxima in one pass: that of oneDNN turns NaN into zero, and would hide that training has
diverged. So does its maximum of a number and zero; that of a number and NaN, in this order, is NaN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from chainer.functions.activation.elu import ELU, ELUGrad
from chainer.functions.activation.leaky_relu import LeakyReLU, _LeakyReLUGrad
from chainer.functions.activation.relu import ReLU, ReLUGrad2
from chainer.functions.activation.sigmoid import Sigmoid, SigmoidGrad
from chainer.functions.activation.tanh import TanhGrad

from chainer_dist.kernels import layouts, memory
from chainer_dist.kernels.cache import kept
from chainer_dist.kernels.onednn import (
    DIFF_DST,
    DIFF_SRC,
    DST,
    IS_GREATER,
    MAXIMUM,
    PRODUCT,
    SECOND_SRC,
    SRC,
    SRC_AFTERWARDS,
    TRAINING,
    Description,
    Layout,
    Operation,
)
from chainer_dist.kernels.replacements import replaces

if TYPE_CHECKING:
    from chainer_dist.kernels.layouts import Array

_RELU, _LOGISTIC = 0x20, 0x29
# Algorithms that compute the gradient from the output instead of the input.
_TANH_BY_OUTPUT, _LOGISTIC_BY_OUTPUT = 0x101, 0x104

_ZERO = np.zeros((1, 1), np.float32)

# With fewer values NumPy's ReLU and its gradient take less time than the calls.
_FEW_FOR_RELU = 1 << 15


@kept
def _forward(algorithm: int, size: int, alpha: float) -> Operation:
    row = Layout.flat(size)
    parameters = [TRAINING, algorithm, row, row, alpha, 0.0]
    return Operation("eltwise_forward", parameters, [(SRC, row)], [(DST, row)])


@kept
def _backward(algorithm: int, size: int, alpha: float) -> Operation:
    row = Layout.flat(size)
    hint = Description("eltwise_forward", [TRAINING, algorithm, row, row, alpha, 0.0])
    parameters = [algorithm, row, row, row, alpha, 0.0, hint]
    known = SRC if algorithm == _RELU else DST
    inputs = [(DIFF_DST, row), (known, row)]
    return Operation("eltwise_backward", parameters, inputs, [(DIFF_SRC, row)])


@kept
def _compare_with_zero(algorithm: int, size: int, afterwards: int) -> Operation:
    row, zero = Layout.dense((1, size)), Layout.dense((1, 1))
    inputs = [(SRC, row), (SECOND_SRC, zero), (SRC_AFTERWARDS, row)]
    parameters = [algorithm, row, zero, row]
    return Operation("binary", parameters, inputs, [(DST, row)], (afterwards, row))


def _is_worth_it(*arrays: Array) -> bool:
    return (
        arrays[0].size >= layouts.FEW
        and layouts.is_suitable(*arrays)
        and layouts.in_memory_order(arrays[0]) is not None
    )


def _apply(algorithm: int, x: Array, alpha: float = 0.0) -> Array:
    y = memory.empty_like(x)
    _forward(algorithm, x.size, alpha)(x, y)
    return y


def _apply_gradient(algorithm: int, known: Array, gy: Array, alpha: float = 0.0) -> Array:
    gy, gx = layouts.gradients_like(known, gy)
    _backward(algorithm, known.size, alpha)(gy, known, gx)
    return gx


@replaces(ReLU, "forward_cpu")
def _relu(chainers: Any, self: Any, inputs: tuple[Array]) -> Any:
    (x,) = inputs
    if x.size < _FEW_FOR_RELU or not _is_worth_it(x):
        return chainers(self, inputs)
    self.retain_outputs((0,))
    y = memory.empty_like(x)
    _compare_with_zero(MAXIMUM, x.size, MAXIMUM)(x, _ZERO, x, y)
    return (y,)


@replaces(ReLUGrad2, "forward_cpu")
def _relu_gradient(chainers: Any, self: Any, inputs: tuple[Array]) -> Any:
    (gy,) = inputs
    y = self.b
    if y.size < _FEW_FOR_RELU or not _is_worth_it(y, gy) or y.shape != gy.shape:
        return chainers(self, inputs)
    gy, gx = layouts.gradients_like(y, gy)
    _compare_with_zero(IS_GREATER, y.size, PRODUCT)(y, _ZERO, gy, gx)
    return (gx,)


@replaces(LeakyReLU, "forward_cpu")
def _leaky_relu(chainers: Any, self: Any, inputs: tuple[Array]) -> Any:
    (x,) = inputs
    if not _is_worth_it(x) or self.slope == 0:  # that is oneDNN's ReLU, for which NaN is zero
        return chainers(self, inputs)
    if self.slope >= 0:
        self.retain_outputs((0,))
    else:
        self.retain_inputs((0,))
    return (_apply(_RELU, x, float(self.slope)),)


@replaces(_LeakyReLUGrad, "forward_cpu")
def _leaky_relu_gradient(chainers: Any, self: Any, inputs: tuple[Array]) -> Any:
    (gy,) = inputs
    if not _is_worth_it(self.cond, gy) or self.cond.shape != gy.shape:
        return chainers(self, inputs)
    return (_apply_gradient(_RELU, self.cond, gy, float(self.slope)),)


@replaces(ELU, "forward_cpu", needs_onednn=False)
def _elu(chainers: Any, self: Any, inputs: tuple[Array]) -> Any:
    (x,) = inputs
    if not layouts.is_suitable(x):
        return chainers(self, inputs)
    if self.alpha < 0:
        self.retain_inputs((0,))
    self.retain_outputs((0,))
    y = np.minimum(x, 0)
    np.expm1(y, out=y)
    y *= np.float32(self.alpha)
    np.copyto(y, x, where=x > 0)
    return (y,)


@replaces(ELUGrad, "forward_cpu", needs_onednn=False)
def _elu_gradient(chainers: Any, self: Any, inputs: tuple[Array]) -> Any:
    (y,) = inputs
    if not layouts.is_suitable(y, self.cond):
        return chainers(self, inputs)
    gx = y + np.float32(self.alpha)
    np.copyto(gx, np.float32(1), where=self.cond > 0)
    return (gx,)


@replaces(Sigmoid, "forward_cpu")
def _sigmoid(chainers: Any, self: Any, inputs: tuple[Array]) -> Any:
    (x,) = inputs
    if not _is_worth_it(x):
        return chainers(self, inputs)
    self.retain_outputs((0,))
    self._use_cudnn = False
    return (_apply(_LOGISTIC, x),)


@replaces(SigmoidGrad, "forward_cpu")
def _sigmoid_gradient(chainers: Any, self: Any, inputs: tuple[Array, Array]) -> Any:
    return _gradient_by_output(_LOGISTIC_BY_OUTPUT, chainers, self, inputs)


@replaces(TanhGrad, "forward_cpu")
def _tanh_gradient(chainers: Any, self: Any, inputs: tuple[Array, Array]) -> Any:
    return _gradient_by_output(_TANH_BY_OUTPUT, chainers, self, inputs)


def _gradient_by_output(
    algorithm: int, chainers: Any, function: Any, inputs: tuple[Array, Array]
) -> Any:
    y, gy = inputs
    if not _is_worth_it(y, gy) or y.shape != gy.shape:
        return chainers(function, inputs)
    function.retain_inputs((0, 1))
    return (_apply_gradient(algorithm, y, gy),)
