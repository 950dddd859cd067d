"""Checks that Chainer makes of every array, several times in each function, in a faster way for NumPy's arrays."""

from __future__ import annotations

from typing import Any

import chainer
import numpy as np
from chainer import backend
from chainer.utils import type_check

from chainer_dist.kernels.replacements import is_unchanged, replaces

_CPU = backend.CpuDevice()


@replaces(chainer, "is_arrays_compatible", needs_onednn=False, is_computation=False)
def _are_compatible(chainers: Any, arrays: Any) -> Any:
    if type(arrays) not in (tuple, list):  # an iterator can be read only once
        return chainers(arrays)
    for array in arrays:
        if type(array) is not np.ndarray and array is not None:
            return chainers(arrays)
    return True


@replaces(backend, "get_device_from_array", needs_onednn=False, is_computation=False)
def _device(chainers: Any, *arrays: Any) -> Any:
    for array in arrays:
        if type(array) is not np.ndarray:
            return chainers(*arrays)
    return _CPU


@replaces(
    chainer.FunctionNode, "_check_data_type_forward", needs_onednn=False, is_computation=False
)
def _check_types(chainers: Any, self: Any, in_data: Any) -> None:
    # Most gradients have no check of their own. Chainer's call of the empty one takes as long as a small product.
    check = self.check_type_forward
    if is_unchanged(check, chainer.FunctionNode.check_type_forward):
        return
    if any(self._input_layouts):
        chainers(self, in_data)
        return
    try:
        with type_check.light_mode:
            check(type_check.LightTypeInfoTuple(in_data))
    except type_check.InvalidType:
        # As Chainer does it, once more for a message.
        in_types = type_check.get_types(in_data, "in_types", accept_none=False)
        with type_check.get_function_check_context(self):
            check(in_types)


@replaces(type_check, "expect_broadcast_shapes", needs_onednn=False, is_computation=False)
def _expect_broadcast_shapes(chainers: Any, *shapes: Any) -> None:
    # Equal shapes fit. They are tuples where a check is made for the first time, and expressions in the second one.
    if not shapes or type(shapes[0]) is not tuple or shapes.count(shapes[0]) < len(shapes):
        chainers(*shapes)
