"""Gradients of functions that return views, without functions of their own: views where they can be."""

from __future__ import annotations

from typing import Any

import chainer
import numpy as np
from chainer.functions.array.reshape import Reshape
from chainer.functions.array.separate import Separate
from chainer.functions.array.transpose import Transpose

from chainer_dist.kernels import memory
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


@replaces(Separate, "forward", needs_onednn=False)
def _separate(chainers: Any, self: Any, inputs: tuple[Any]) -> Any:
    self._strides = getattr(inputs[0], "strides", None)
    return chainers(self, inputs)


@replaces(Separate, "backward", needs_onednn=False)
def _separate_gradient(
    chainers: Any, self: Any, indexes: tuple[int], grad_outputs: tuple[Any, ...]
) -> Any:
    strides = getattr(self, "_strides", None)  # None if Chainer's own code separated the array
    given = [gy for gy in grad_outputs if gy is not None]
    if strides is None or not all(map(_is_plain, given)) or not _fit(given, self):
        return chainers(self, indexes, grad_outputs)
    # In the order of the array in memory, so that gradients of a transposition before it need no copy.
    gx = memory.empty_in_order(self.inputs[0].shape, strides, self._dtype)
    by_part = np.moveaxis(gx, self.axis, 0)
    for i, gy in enumerate(grad_outputs):
        by_part[i] = 0 if gy is None else gy.raw_array
    return (variable(gx),)


def _fit(gradients: list[Any], function: Any) -> bool:
    """Return whether gradients are those of the outputs of ``F.separate``. Local."""
    wanted = function._shape, function._dtype
    return all((gy.shape, gy.dtype) == wanted for gy in gradients)
