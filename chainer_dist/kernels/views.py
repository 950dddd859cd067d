"""Gradients of functions that return a view: a view of the gradient, without a function of its own."""

from __future__ import annotations

from typing import Any

import chainer
import numpy as np
from chainer.functions.array.reshape import Reshape
from chainer.functions.array.transpose import Transpose

from chainer_dist.kernels.replacements import replaces
from chainer_dist.kernels.variables import variable


def _is_plain(gradient: Any) -> bool:
    """Return whether a gradient can be viewed by NumPy, and no gradients of gradients are wanted. Local."""
    return (
        not chainer.config.enable_backprop
        and gradient.layout is None
        and type(gradient.raw_array) is np.ndarray
    )


@replaces(Reshape, "backward", needs_onednn=False)
def _reshape_gradient(
    chainers: Any, self: Any, indexes: tuple[int], grad_outputs: tuple[Any]
) -> Any:
    (gy,) = grad_outputs
    if not _is_plain(gy):
        return chainers(self, indexes, grad_outputs)
    return (variable(gy.raw_array.reshape(self.inputs[0].shape), requires_grad=True),)


@replaces(Transpose, "backward", needs_onednn=False)
def _transpose_gradient(
    chainers: Any, self: Any, indexes: tuple[int], grad_outputs: tuple[Any]
) -> Any:
    (gy,) = grad_outputs
    if not _is_plain(gy):
        return chainers(self, indexes, grad_outputs)
    axes, inverse = self.axes, None
    if axes:
        inverse = sorted(range(len(axes)), key=lambda position: axes[position] % len(axes))
    return (variable(gy.raw_array.transpose(inverse), requires_grad=True),)
