"""The global random states of a rank, from which dropout, shuffling and initializers draw."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np

__all__ = [
    "derive_random_state",
    "global_generator",
    "random_state",
    "set_random_state",
]


_GENERATOR = "MT19937"


def global_generator() -> np.random.RandomState:
    """Return the generator behind the functions of ``numpy.random``."""
    generator: np.random.RandomState = np.random.random.__self__  # type: ignore[attr-defined]
    return generator


def random_state() -> dict[str, Any]:
    """Return the states of ``numpy.random`` and ``random``. Local.

    Raises:
        ValueError: If ``numpy.random`` uses another generator than its own.
    """
    own: Any = np.random.get_state()  # noqa: NPY002 - what Chainer draws from
    if not isinstance(own, tuple) or own[0] != _GENERATOR:
        raise ValueError(
            f"numpy.random uses another generator than {_GENERATOR}, which cannot be saved"
        )
    return {"numpy": own, "python": random.getstate()}


def set_random_state(state: dict[str, Any]) -> None:
    """Set the states that :func:`random_state` has returned. Local."""
    np.random.set_state(tuple(state["numpy"]))  # noqa: NPY002 - what Chainer draws from
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def derive_random_state(saved: bytes, rank: int, size: int) -> None:
    """Set random states of this rank's own, which follow from the bytes of a saved one. Local."""
    seed = hashlib.sha256(saved + f" on rank {rank} of {size}".encode()).digest()
    np.random.seed(np.frombuffer(seed, dtype=np.uint32))  # noqa: NPY002 - what Chainer draws from
    random.seed(seed)
