"""Layer normalization by oneDNN, and its gradient by oneDNN or NumPy, as one operation instead of twenty."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import chainer
import numpy as np
from chainer.functions.normalization.layer_normalization import LayerNormalization

from chainer_dist.kernels import layouts, memory, replacements
from chainer_dist.kernels.cache import kept
from chainer_dist.kernels.onednn import (
    BACKWARD,
    DIFF_DST,
    DIFF_SCALE,
    DIFF_SHIFT,
    DIFF_SRC,
    DST,
    MEAN,
    SCALE,
    SCALE_AND_SHIFT,
    SHIFT,
    SRC,
    TRAINING,
    VARIANCE,
    Description,
    Layout,
    Operation,
)
from chainer_dist.kernels.replacements import replaces
from chainer_dist.kernels.variables import variable

if TYPE_CHECKING:
    from chainer_dist.kernels.layouts import Array


def _layouts(n: int, units: int) -> tuple[Layout, Layout, Layout]:
    """Return the layouts of the data, of one number per example, and of one number per unit. Local."""
    return Layout.dense((n, units)), Layout.flat(n), Layout.flat(units)


@kept
def _forward(n: int, units: int, eps: float) -> Operation:
    x, examples, each = _layouts(n, units)
    parameters = [TRAINING, x, x, examples, eps, SCALE_AND_SHIFT]
    inputs = [(SRC, x), (SCALE, each), (SHIFT, each)]
    outputs = [(DST, x), (MEAN, examples), (VARIANCE, examples)]
    return Operation("layer_normalization_forward", parameters, inputs, outputs)


@kept
def _backward(n: int, units: int, eps: float) -> Operation:
    x, examples, each = _layouts(n, units)
    forward = [TRAINING, x, x, examples, eps, SCALE_AND_SHIFT]
    hint = Description("layer_normalization_forward", forward)
    parameters = [BACKWARD, x, x, x, examples, eps, SCALE_AND_SHIFT, hint]
    inputs = [(SRC, x), (MEAN, examples), (VARIANCE, examples), (DIFF_DST, x), (SCALE, each)]
    inputs.append((SHIFT, each))  # oneDNN 3.2 does not read it, but demands it
    outputs = [(DIFF_SRC, x), (DIFF_SCALE, each), (DIFF_SHIFT, each)]
    return Operation("layer_normalization_backward", parameters, inputs, outputs)


def _is_possible(x: Array, *of_units: Array) -> bool:
    return (
        layouts.is_suitable(x, *of_units)
        and x.ndim == 2  # noqa: PLR2004 - (batch, units)
        and all(each.shape == x.shape[1:] for each in of_units)
    )


@replaces(LayerNormalization, "forward")
def _normalize(chainers: Any, self: Any, inputs: tuple[Array, Array, Array]) -> Any:
    self._statistics = None
    if not _is_possible(*inputs):
        return chainers(self, inputs)
    self.retain_inputs((0, 1))
    x, gamma, beta = map(np.ascontiguousarray, inputs)
    y = memory.empty_like(x)
    mean, variance = np.empty(len(x), np.float32), np.empty(len(x), np.float32)
    _forward(*x.shape, float(self.eps))(x, gamma, beta, y, mean, variance)
    self._statistics = mean, variance
    return (y,)


@replaces(LayerNormalization, "backward", needs_onednn=False)
def _normalize_gradient(
    chainers: Any, self: Any, indexes: tuple[int, ...], grad_outputs: tuple[Any]
) -> Any:
    x, gamma = (each.array for each in self.get_retained_inputs())
    gy = grad_outputs[0].array
    # Gradients of gradients need a graph, which only Chainer's own code makes.
    if (
        chainer.config.enable_backprop
        or not _is_possible(x, gamma)
        or not layouts.is_suitable(gy)
        or gy.shape != x.shape
    ):
        return chainers(self, indexes, grad_outputs)
    statistics = getattr(self, "_statistics", None)
    if statistics is None or not replacements.uses_onednn():
        gradients = _gradients(x, gamma, gy, self.eps)
    else:
        x, gamma, gy = map(np.ascontiguousarray, (x, gamma, gy))
        gradients = memory.empty_like(x), np.empty_like(gamma), np.empty_like(gamma)
        _backward(*x.shape, float(self.eps))(x, *statistics, gy, gamma, gamma, *gradients)
    return tuple(map(variable, gradients))


def _gradients(x: Array, gamma: Array, gy: Array, eps: float) -> tuple[Array, Array, Array]:
    """Return the gradients with respect to x, gamma and beta as new arrays, computed by NumPy. Local."""
    x_hat = x - x.mean(axis=1, keepdims=True)
    inv_std = np.reciprocal(np.sqrt(_mean_of_products(x_hat, x_hat) + np.float32(eps)))
    x_hat *= inv_std
    ones = np.ones(len(gy), np.float32)
    gbeta = ones @ gy
    gx = gy * x_hat
    ggamma = ones @ gx
    np.multiply(gy, gamma, out=gx)
    mean = gx.mean(axis=1, keepdims=True)
    x_hat *= _mean_of_products(gx, x_hat)
    gx -= mean
    gx -= x_hat
    gx *= inv_std
    return gx, ggamma, gbeta


def _mean_of_products(a: Array, b: Array) -> Array:
    means: Array = np.einsum("ij,ij->i", a, b)[:, None]
    means /= np.float32(a.shape[1])
    return means
