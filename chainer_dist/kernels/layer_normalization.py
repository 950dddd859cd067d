"""Layer normalization by oneDNN, and its gradient as one operation instead of a graph of twenty."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import chainer
import numpy as np
from chainer.functions.normalization.layer_normalization import LayerNormalization

from chainer_dist.kernels import layouts
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
    kept,
)
from chainer_dist.kernels.replacements import replaces

if TYPE_CHECKING:
    from chainer_dist.kernels.layouts import Array


def _layouts(n: int, units: int) -> tuple[Layout, Layout, Layout]:
    """Return those of the data, of a number for each example, and of a number for each unit. Local."""
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
    inputs.append((SHIFT, each))  # not read, but oneDNN 3.2 counts it
    outputs = [(DIFF_SRC, x), (DIFF_SCALE, each), (DIFF_SHIFT, each)]
    return Operation("layer_normalization_backward", parameters, inputs, outputs)


@replaces(LayerNormalization, "forward")
def _normalize(chainers: Any, self: Any, inputs: tuple[Array, Array, Array]) -> Any:
    self._statistics = None
    if not layouts.is_suitable(*inputs):
        return chainers(self, inputs)
    self.retain_inputs((0, 1))
    x, gamma, beta = map(np.ascontiguousarray, inputs)
    y = np.empty_like(x)
    mean, variance = np.empty(len(x), np.float32), np.empty(len(x), np.float32)
    _forward(*x.shape, float(self.eps))(x, gamma, beta, y, mean, variance)
    self._statistics = mean, variance
    return (y,)


@replaces(LayerNormalization, "backward")
def _normalize_gradient(
    chainers: Any, self: Any, indexes: tuple[int, ...], grad_outputs: tuple[Any]
) -> Any:
    x, gamma = (each.array for each in self.get_retained_inputs())
    gy = grad_outputs[0].array
    # A gradient that is differentiated again has to be a graph.
    if (
        chainer.config.enable_backprop
        or getattr(self, "_statistics", None) is None
        or not layouts.is_suitable(x, gamma, gy)
    ):
        return chainers(self, indexes, grad_outputs)
    x, gamma, gy = map(np.ascontiguousarray, (x, gamma, gy))
    gx, ggamma, gbeta = np.empty_like(x), np.empty_like(gamma), np.empty_like(gamma)
    operation = _backward(*x.shape, float(self.eps))
    operation(x, *self._statistics, gy, gamma, gamma, gx, ggamma, gbeta)
    return tuple(map(chainer.as_variable, (gx, ggamma, gbeta)))
