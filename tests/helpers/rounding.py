"""Means with the roundings of compressed exchanges, by NumPy."""

from __future__ import annotations

import numpy as np


def nearest(values, way):
    """Return the nearest float16 or bfloat16, as float32."""
    if way == "float16":
        return values.astype(np.float16).astype(np.float32)
    mantissa, exponent = np.frexp(values.astype(np.float64))
    return np.ldexp(np.rint(mantissa * 256) / 256, exponent).astype(np.float32)


def rounded_mean(comm, way, everyone, *, again=True):
    """Return the mean of all ranks' arrays with the roundings that are promised, and no other.

    Between more than two nodes it is rounded ``again``.
    """
    sums = {}
    for node, array in zip(comm.allgather_obj(comm.inter_rank), everyone):
        sums[node] = array.astype(np.float32) + sums.get(node, np.float32(0))
    if len(sums) == 1:
        return sums[0] * np.float32(1 / comm.size)
    total = np.float32(0)
    for _, each in sorted(sums.items()):
        total = total + nearest(each * np.float32(1 / comm.size), way)
    return nearest(total, way) if again and len(sums) > 2 else total
