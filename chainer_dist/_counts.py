"""Counts that a caller gives, checked in the same way and in the same words everywhere."""

from __future__ import annotations

import operator
from typing import SupportsIndex

__all__ = ["checked_count"]


def checked_count(name: str, value: SupportsIndex, least: int) -> int:
    """Return a count as an int. Local.

    Args:
        name: Name of the parameter, for the error.
        value: An integer of Python or NumPy.
        least: Smallest count that is allowed.

    Raises:
        TypeError: If ``value`` is no integer.
        ValueError: If it is less than ``least``.
    """
    number = operator.index(value)
    if number < least:
        raise ValueError(f"{name} is {number}, expected {least} or more")
    return number
