"""The entries of a checkpoint that are beside Chainer's own: their names, and what they hold as JSON.

They are arrays that need no pickle.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from chainer_dist._typing import Array

__all__ = [
    "BESIDE",
    "DESCRIPTION",
    "OWN",
    "OWN_PARAMETERS",
    "RANDOM",
    "SCALARS",
    "decode",
    "encode",
]


BESIDE = "+"  # begins the name of every such entry
RANDOM = f"{BESIDE}random"
# Before the path of an object that is the same on all ranks, for what each rank has alone of it.
OWN = f"{BESIDE}own:"
OWN_PARAMETERS = f"{BESIDE}own_parameters"
DESCRIPTION = f"{BESIDE}description"
SCALARS = f"{BESIDE}scalars"  # names of entries that were numbers of Python, not of NumPy


def encode(value: Any) -> Array:
    """Return what JSON can hold as an array of bytes. Local."""
    return np.frombuffer(json.dumps(value, default=np.ndarray.tolist).encode(), dtype=np.uint8)


def decode(array: Array) -> Any:
    """Return what :func:`encode` was given; tuples and arrays come back as lists. Local."""
    return json.loads(array.tobytes())
