"""Counts that a caller gives, checked in the same way and in the same words everywhere."""

from __future__ import annotations

import operator
from typing import SupportsIndex

__all__ = ["checked_count", "count_property"]


def checked_count(name: str, value: SupportsIndex, least: int, end: int | None = None) -> int:
    """Return a count as an int. Local.

    Args:
        name: Name of the parameter, for the error.
        value: An integer of Python or NumPy.
        least: Smallest count that is allowed.
        end: Smallest count that is too large; None for no limit.

    Raises:
        TypeError: If ``value`` is no integer.
        ValueError: If it is less than ``least``, or not below ``end``.
    """
    try:
        number = operator.index(value)
    except TypeError:
        kind = type(value).__name__
        raise TypeError(f"{name} is {value!r}, expected an integer, got {kind}") from None
    if number < least or (end is not None and number >= end):
        limits = f"{least} or more" if end is None else f"{least} to {end - 1}"
        raise ValueError(f"{name} is {number}, expected {limits}")
    return number


def count_property(name: str, least: int, doc: str) -> property:
    """Return a property for a count that is checked whenever it is set.

    Args:
        name: Name of the property; the count is the attribute of this name after an underscore.
        least: Smallest count that is allowed.
        doc: The property's docstring.
    """
    attribute = f"_{name}"

    def get(owner: object) -> int:
        number: int = getattr(owner, attribute)
        return number

    def set_checked(owner: object, value: SupportsIndex) -> None:
        setattr(owner, attribute, checked_count(name, value, least))

    return property(get, set_checked, doc=doc)
