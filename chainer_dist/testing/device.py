"""Naming a device by the two options that test suites have."""

from __future__ import annotations

from typing import Any

import chainer


def get_device(device_id: int | None = None, use_chainerx: bool = False) -> Any:
    """Return a Chainer device. Local. The same as ChainerMN's ``get_device``.

    Args:
        device_id: Number of a GPU; None is the CPU.
        use_chainerx: Whether arrays are ChainerX's, rather than NumPy's or CuPy's.

    Returns:
        The :class:`chainer.backend.Device` named ``@numpy``, ``@cupy:N``, ``native:0`` or
        ``cuda:N``. chainer_dist itself trains on the first of these.

    Raises:
        RuntimeError: If CuPy or ChainerX is asked for and Chainer cannot use it here.
    """
    if device_id is None:
        return chainer.get_device("native:0" if use_chainerx else "@numpy")
    return chainer.get_device(f"cuda:{device_id}" if use_chainerx else f"@cupy:{device_id}")
