"""Checks that Chainer makes of every array, several times in each function, in a faster way for NumPy's arrays."""

from __future__ import annotations

from typing import Any

import chainer
import numpy as np
from chainer import backend

from chainer_dist.kernels.replacements import replaces

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
    check = getattr(
        self.check_type_forward, "__func__", None
    )  # None for one that only this function has
    if check is not chainer.FunctionNode.check_type_forward:
        chainers(self, in_data)
