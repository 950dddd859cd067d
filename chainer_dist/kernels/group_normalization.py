"""Group normalization and its gradient by oneDNN, for arrays whose channels are last in memory.

oneDNN 3.2 has no group normalization. Its batch normalization, applied to one example at a time, computes the moments
of the channels, from which the moments of groups follow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import chainer
import numpy as np
from chainer.functions.normalization.group_normalization import GroupNormalization

from chainer_dist.kernels import channels, layouts
from chainer_dist.kernels.replacements import replaces
from chainer_dist.kernels.variables import variable

if TYPE_CHECKING:
    from chainer_dist.kernels.layouts import Array

# Number of values of an example below which the calls cost more than they save.
_FEW = 1 << 14


def _is_possible(groups: int, x: Array, *of_channels: Array) -> bool:
    return (
        x.ndim > 2  # noqa: PLR2004 - (batch, channels, ...)
        and x.size >= _FEW * len(x)
        and x.shape[1] % groups == 0
        and layouts.is_suitable(x, *of_channels)
        and layouts.is_channels_last(x)
        and all(each.shape == x.shape[1:2] for each in of_channels)
    )


def _examples(x: Array) -> Any:
    """Return a view of shape ``(batch, positions, channels)``. Local."""
    return layouts.to_last(x).reshape(len(x), -1, x.shape[1])


@replaces(GroupNormalization, "forward")
def _normalize(chainers: Any, self: Any, inputs: tuple[Array, Array, Array]) -> Any:
    x, gamma, beta = inputs
    if not _is_possible(self.groups, x, gamma, beta):
        return chainers(self, inputs)
    self.retain_inputs((0, 1))
    y = layouts.empty(x.shape)
    given, made = _examples(x), _examples(y)
    n, *size = given.shape
    means, variances = np.empty((2, n, size[1]), np.float32)
    for each in zip(given, made, means, variances):
        channels.measure(*size)(*each)
    in_groups = n, self.groups, -1
    of_channels = means.reshape(in_groups).astype(np.float64)
    mean = of_channels.mean(axis=2, keepdims=True)
    variance = (variances.reshape(in_groups) + (of_channels - mean) ** 2).mean(axis=2)
    # In the form that Chainer's gradient expects.
    self.mean = mean.ravel().astype(np.float32)
    self.inv_std = np.reciprocal(np.sqrt(variance + self.eps)).ravel().astype(np.float32)
    center, inv_std = _of_channels(self, means.shape)
    ones, beta = np.ones(size[1], np.float32), np.ascontiguousarray(beta)
    for row, out, *numbers in zip(given, made, center, inv_std * gamma):
        channels.normalize(*size)(row, numbers[0], ones, numbers[1], beta, out)
    return (y,)


def _of_channels(function: Any, shape: tuple[int, ...]) -> list[Array]:
    """Return mean and reciprocal standard deviation of each example's channels, ``(batch, channels)`` each. Local."""
    return [
        np.repeat(each.reshape(len(each) // function.groups, -1), shape[1] // function.groups, 1)
        for each in (function.mean, function.inv_std)
    ]


@replaces(GroupNormalization, "backward")
def _normalize_gradient(
    chainers: Any, self: Any, indexes: tuple[int, ...], grad_outputs: tuple[Any]
) -> Any:
    x, gamma = (each.array for each in self.get_retained_inputs())
    gy = grad_outputs[0].array
    # Gradients of gradients need a graph, which only Chainer's own code makes.
    if (
        chainer.config.enable_backprop
        or not _is_possible(self.groups, x, gamma)
        or not layouts.is_suitable(gy)
        or gy.shape != x.shape
    ):
        return chainers(self, indexes, grad_outputs)
    gx = layouts.empty(x.shape)
    given, made, gradients = _examples(x), _examples(gx), _examples(layouts.channels_last(gy))
    n, *size = given.shape
    center, inv_std = _of_channels(self, (n, size[1]))
    scale, ones = inv_std * gamma, np.ones(size[1], np.float32)
    products, sums = np.empty((2, n, size[1]), np.float32)
    for row, mean, gradient, *others in zip(given, center, gradients, scale, made, products, sums):
        channels.multiply(*size)(row, mean, ones, gradient, *others)
    products *= inv_std

    def mean_of_group(values: Array) -> Array:
        parts = (values * gamma).reshape(n, self.groups, -1).mean(axis=2) / np.float32(size[0])
        return np.repeat(parts, size[1] // self.groups, 1)

    # gx = (gamma * gy - mean of gamma * gy - x_hat * mean of (gamma * gy * x_hat)) / std
    shift = -inv_std * mean_of_group(sums)
    factor = -inv_std * inv_std * mean_of_group(products)
    added = np.empty(size, np.float32)
    for row, out, mean, *numbers in zip(given, made, center, factor, shift):
        channels.normalize(*size)(row, mean, ones, *numbers, added)
        np.add(out, added, out=out)
    return tuple(map(variable, (gx, products.sum(axis=0), sums.sum(axis=0))))
