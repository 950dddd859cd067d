"""The gradient of what was sliced, such as ``x[i]`` for each i, with each part added where it belongs.

Chainer makes an array of the whole shape for each part, and adds them all up.
"""

from __future__ import annotations

import weakref
from typing import Any

import chainer
import numpy as np
from chainer.functions.array.get_item import GetItem

from chainer_dist.kernels.replacements import replaces

# Chainer asks each function whether it has a way of its own to accumulate. This is the one that it inherits.
GetItem.backward_accumulate = chainer.FunctionNode.backward_accumulate

_MARK = (
    "_chainer_dist_parts"  # an attribute of gradients that are in the hands of this kernel alone
)


def _is_basic(slices: tuple[Any, ...]) -> bool:
    """Return whether slices take no value twice, as arrays of indexes might. Local."""
    return all(
        each is None
        or each is Ellipsis
        or (isinstance(each, (int, np.integer, slice)) and not isinstance(each, bool))
        for each in slices
    )


@replaces(GetItem, "backward_accumulate", needs_onednn=False)
def _accumulate(
    chainers: Any, self: Any, indexes: tuple[int, ...], gys: tuple[Any], gxs: tuple[Any]
) -> Any:
    (gy,), (gx,) = gys, gxs
    if (
        chainer.config.enable_backprop  # for gradients of gradients
        or self.inputs[0].creator_node is None  # its gradient stays, and may be in other hands
        or gy is None
        or type(gy.array) is not np.ndarray
        or not _is_basic(self.slices)
        or (gx is not None and (type(gx.array) is not np.ndarray or gx.dtype != gy.dtype))
    ):
        return chainers(self, indexes, gys, gxs)
    (node,) = self.inputs
    if gx is None:
        gx = chainer.Variable(np.zeros(node.shape, gy.dtype))
        gx.array[self.slices] = gy.array
    else:
        if getattr(gx, _MARK, lambda: None)() is not node:
            gx = chainer.Variable(gx.array.copy())
        gx.array[self.slices] += gy.array
    setattr(gx, _MARK, weakref.ref(node))
    return (gx,)
