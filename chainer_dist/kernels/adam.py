"""Adam's update in place, in blocks that fit the processor's cache: Chainer's operations in the same order, to the bit.

Chainer makes a new array for each of a dozen operations. The variants AdamW, AMSGrad, AdaBound and AMSBound share its code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from chainer.optimizers.adam import AdamRule

from chainer_dist.kernels import layouts
from chainer_dist.kernels.replacements import replaces

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainer_dist.kernels.layouts import Array

# Number of values of a block, which take 128 kB of each array.
_BLOCK = 1 << 15


def _are_plain(arrays: Sequence[Any], numbers: Sequence[Any]) -> bool:
    """Return whether the arrays can be cut into blocks, and numbers are Python's, which keep float32 as it is. Local."""
    return (
        layouts.is_suitable(*arrays)
        and all(each.flags.c_contiguous and each.shape == arrays[0].shape for each in arrays)
        and all(type(each) in (float, int) for each in numbers)
    )


@replaces(AdamRule, "update_core_cpu", needs_onednn=False)
def _update(chainers: Any, self: Any, param: Any) -> None:
    hp, grad = self.hyperparam, param.grad
    if grad is None:
        return
    names = ("m", "v", "vhat") if hp.amsgrad else ("m", "v")
    arrays = [param.array, grad, *(self.state[name] for name in names)]
    bounds = self.bounds if hp.adabound else ()
    numbers = hp.beta1, hp.beta2, hp.eps, hp.eta, hp.weight_decay_rate, self.alpha_t
    if not _are_plain(arrays, (*numbers, *bounds)):
        chainers(self, param)
        return
    self._check_eps(np.float32)
    rows = [each.reshape(-1) for each in arrays]
    size = rows[0].size
    scratch = np.empty(min(size, _BLOCK), np.float32)
    for low in range(0, size, _BLOCK):
        block = [row[low : low + _BLOCK] for row in rows]
        _update_block(block, scratch[: block[0].size], numbers, bounds)


def _update_block(
    arrays: Sequence[Array], y: Array, numbers: Sequence[float], bounds: Sequence[float]
) -> None:
    """Update some values in place. Local.

    Args:
        arrays: Values, gradients, m, v and, for AMSGrad, the largest v so far, each of shape ``(n,)``, float32.
        y: Array of the same shape and dtype for results in between.
        numbers: The decay rates of m and v, eps, eta, the rate of weight decay, and the learning rate of this step.
        bounds: For AdaBound, the least and the largest step.
    """
    x, grad, m, v, *largest = arrays
    beta1, beta2, eps, eta, weight_decay_rate, alpha = numbers
    np.subtract(grad, m, out=y)
    np.multiply(y, 1.0 - beta1, out=y)
    np.add(m, y, out=m)
    np.multiply(grad, grad, out=y)
    np.subtract(y, v, out=y)
    np.multiply(y, 1.0 - beta2, out=y)
    np.add(v, y, out=v)
    for each in largest:
        v = np.maximum(each, v, out=each)
    np.sqrt(v, out=y)
    np.add(y, eps, out=y)
    np.divide(alpha, y, out=y)
    if bounds:
        np.clip(y, bounds[0], bounds[1], out=y)
    np.multiply(y, m, out=y)
    np.multiply(y, -eta, out=y)
    if weight_decay_rate:
        np.multiply(x, 1.0 - eta * weight_decay_rate, out=x)
    np.add(x, y, out=x)
