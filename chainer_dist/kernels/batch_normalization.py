"""Batch normalization, in training and with fixed statistics, by oneDNN."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from chainer.functions.normalization import batch_normalization as chainers_module
from chainer.functions.normalization.batch_normalization import (
    FixedBatchNormalization,
    GeneralBatchNormalizationImpl,
)

from chainer_dist.kernels import layouts
from chainer_dist.kernels.cache import kept
from chainer_dist.kernels.onednn import (
    BACKWARD,
    DIFF_DST,
    DIFF_SCALE,
    DIFF_SHIFT,
    DIFF_SRC,
    DST,
    INFERENCE,
    MEAN,
    SCALE,
    SCALE_AND_SHIFT,
    SHIFT,
    SRC,
    TRAINING,
    USE_GIVEN_STATISTICS,
    VARIANCE,
    Description,
    Layout,
    Operation,
)
from chainer_dist.kernels.replacements import replaces

if TYPE_CHECKING:
    from chainer_dist.kernels.layouts import Array

_MOST_DIMENSIONS = 5  # with more, oneDNN writes outside the arrays


def _parameters(shape: tuple[int, ...], eps: float, flags: int) -> list[Any]:
    layout = Layout.channels_last(shape)
    return [layout, layout, eps, flags]


@kept
def _forward(shape: tuple[int, ...], eps: float) -> Operation:
    x, channels = Layout.channels_last(shape), Layout.flat(shape[1])
    inputs = [(SRC, x), (SCALE, channels), (SHIFT, channels)]
    outputs = [(DST, x), (MEAN, channels), (VARIANCE, channels)]
    parameters = [TRAINING, *_parameters(shape, eps, SCALE_AND_SHIFT)]
    return Operation("batch_normalization_forward", parameters, inputs, outputs)


@kept
def _fixed(shape: tuple[int, ...], eps: float) -> Operation:
    x, channels = Layout.channels_last(shape), Layout.flat(shape[1])
    given = [(SCALE, channels), (SHIFT, channels), (MEAN, channels), (VARIANCE, channels)]
    flags = SCALE_AND_SHIFT | USE_GIVEN_STATISTICS
    parameters = [INFERENCE, *_parameters(shape, eps, flags)]
    return Operation("batch_normalization_forward", parameters, [(SRC, x), *given], [(DST, x)])


@kept
def _backward(shape: tuple[int, ...], eps: float) -> Operation:
    x, channels = Layout.channels_last(shape), Layout.flat(shape[1])
    layouts_and_more = _parameters(shape, eps, SCALE_AND_SHIFT)
    hint = Description("batch_normalization_forward", [TRAINING, *layouts_and_more])
    inputs = [(SRC, x), (MEAN, channels), (VARIANCE, channels), (DIFF_DST, x), (SCALE, channels)]
    outputs = [(DIFF_SRC, x), (DIFF_SCALE, channels), (DIFF_SHIFT, channels)]
    parameters = [BACKWARD, x, *layouts_and_more, hint]
    return Operation("batch_normalization_backward", parameters, inputs, outputs)


def _shape(x: Array) -> tuple[int, ...]:
    """Return the shape for oneDNN, which is faster with one image of many positions than with a matrix. Local."""
    return x.shape if x.ndim > 2 else (1, x.shape[1], x.shape[0], 1)  # noqa: PLR2004


def _is_possible(axis: Any, *arrays: Array) -> bool:
    """Return whether oneDNN can normalize arrays. Local.

    Args:
        axis: Axes over which statistics are taken.
        arrays: The input, of shape ``(batch, channels, ...)``, and arrays of shape ``(channels,)``.
    """
    x, channels = arrays[0], arrays[1:]
    return (
        1 < x.ndim <= _MOST_DIMENSIONS
        and tuple(axis) == (0, *range(2, x.ndim))
        and layouts.is_suitable(*arrays)
        and all(each.shape == (x.shape[1],) for each in channels)
    )


@replaces(GeneralBatchNormalizationImpl, "forward")
def _normalize(chainers: Any, self: Any, **given: Any) -> Any:
    x, gamma, beta, eps = (given[name] for name in ("x", "gamma", "beta", "eps"))
    # Subclasses, such as ChainerMN's, compute their statistics in other ways.
    if type(self) is not GeneralBatchNormalizationImpl or not _is_possible(
        given["axis"], x, gamma, beta
    ):
        return chainers(self, **given)
    x = layouts.channels_last(x)
    y = layouts.empty(x.shape)
    mean, var = np.empty_like(gamma), np.empty_like(gamma)
    _forward(_shape(x), float(eps))(x, *map(np.ascontiguousarray, (gamma, beta)), y, mean, var)
    running_mean, running_var, decay = (
        given[name] for name in ("running_mean", "running_var", "decay")
    )
    if running_mean is not None:
        count = x.size // gamma.size
        running_mean *= decay
        running_mean += (1 - decay) * mean
        running_var *= decay
        running_var += (1 - decay) * (count / max(count - 1.0, 1.0)) * var
    inv_std = np.reciprocal(np.sqrt(var + np.float32(eps)))
    # Chainer passes the last value on to backward. Its own backward ignores it; the one below needs it.
    return y, given["x_layout"], running_mean, running_var, mean, var, inv_std, var


@replaces(GeneralBatchNormalizationImpl, "backward")
def _normalize_gradient(chainers: Any, self: Any, *given: Any) -> Any:
    axis, gamma, gy, x, x_layout, _, _, mean, _, eps, _, var = given
    if (
        var is None
        or not _is_possible(axis, x, gamma)
        or not layouts.is_suitable(gy)
        or gy.shape != x.shape
    ):
        return chainers(self, *given)
    x, gy = layouts.channels_last(x), layouts.channels_last(gy)
    gx = layouts.empty(x.shape)
    ggamma, gbeta = np.empty_like(gamma), np.empty_like(gamma)
    gamma = np.ascontiguousarray(gamma)
    _backward(_shape(x), float(eps))(x, mean, var, gy, gamma, gx, ggamma, gbeta)
    return gx, x_layout, ggamma, gbeta


@replaces(FixedBatchNormalization, "forward")
def _normalize_by_given(chainers: Any, self: Any, inputs: tuple[Array, ...]) -> Any:
    x, gamma, beta, mean, var = inputs
    axis = chainers_module._compute_axis(x.ndim, gamma.ndim, self.axis)
    if not isinstance(x, np.ndarray) or not _is_possible(axis, x, gamma, beta, mean, var):
        return chainers(self, inputs)
    self.retain_inputs((0, 1, 3, 4))
    self.axis, self.key_axis = axis, (1,)
    self.expander = (None, slice(None), *[None] * (x.ndim - 2))
    self.inv_std = self.inv_var = None  # Chainer's gradient computes them if they are None
    y = layouts.empty(x.shape)
    channels = map(np.ascontiguousarray, (gamma, beta, mean, var))
    _fixed(_shape(x), float(self.eps))(layouts.channels_last(x), *channels, y)
    return (y,)
