"""Sums over all dimensions but the channels, such as gradients of biases, as products by a row of ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chainer.functions.math.sum import Sum

from chainer_dist.kernels import layouts
from chainer_dist.kernels.matrices import FEW_TO_SUM, sum_of_rows
from chainer_dist.kernels.replacements import replaces

if TYPE_CHECKING:
    from chainer_dist.kernels.layouts import Array


@replaces(Sum, "forward", needs_onednn=False)
def _sum(chainers: Any, self: Any, inputs: tuple[Array]) -> Any:
    (x,) = inputs
    if (
        x.size < FEW_TO_SUM
        or self.axis is None
        or self.keepdims
        or not layouts.is_suitable(x)
        or x.ndim < 2  # noqa: PLR2004 - batch and channels
        or sorted(a + x.ndim if a < 0 else a for a in self.axis) != [0, *range(2, x.ndim)]
        or not layouts.is_channels_last(x)
    ):
        return chainers(self, inputs)
    return (sum_of_rows(layouts.rows(x)),)
