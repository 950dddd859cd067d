"""The gradient of slices, such as ``x[i]`` for each i, added in place to one array.

Chainer makes an array of the whole shape for each slice, and adds all of them.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import chainer
import numpy as np
from chainer._backprop_utils import GradTable
from chainer.functions.array.get_item import GetItem

from chainer_dist.kernels.replacements import replaces
from chainer_dist.kernels.variables import variable

# A replacement needs an attribute of the class itself. It has to be this very function, since Chainer takes any other
# one for an implementation of accumulation, also after kernels are taken out.
GetItem.backward_accumulate = chainer.FunctionNode.backward_accumulate

# Attribute of gradients that only this kernel refers to, so that it may change them in place: the node that has the
# gradient, and the backward pass, after which a script has the gradient.
_MARK = "_chainer_dist_parts"

_passes = itertools.count()
_current = next(_passes)


@replaces(GradTable, "__init__", needs_onednn=False, is_computation=False)
def _begin(chainers: Any, self: Any, *args: Any, **kwargs: Any) -> None:
    global _current  # noqa: PLW0603 - passes in other threads, or within this one, only cost a copy
    _current = next(_passes)
    chainers(self, *args, **kwargs)


def _is_basic(slices: tuple[Any, ...]) -> bool:
    """Return whether slices select no value twice, as arrays of indexes might. Local."""
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
        or self.inputs[0].creator_node is None  # a leaf keeps its gradient, which others may use
        or gy is None
        or type(gy.array) is not np.ndarray
        or not _is_basic(self.slices)
        or (gx is not None and (type(gx.array) is not np.ndarray or gx.dtype != gy.dtype))
    ):
        return chainers(self, indexes, gys, gxs)
    (node,) = self.inputs
    if gx is None:
        gx = variable(np.zeros(node.shape, gy.dtype), requires_grad=True)
        gx.array[self.slices] = gy.array
    else:
        if getattr(gx, _MARK, None) != (weakref.ref(node), _current):
            gx = variable(gx.array.copy(), requires_grad=True)
        gx.array[self.slices] += gy.array
    setattr(gx, _MARK, (weakref.ref(node), _current))
    return (gx,)
