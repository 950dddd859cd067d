"""Types of command-line arguments: each is a function of the text that refuses what it cannot be.

``argparse`` makes the option and the text part of its error, on all commands in the same words.
"""

from __future__ import annotations

import argparse
import math

__all__ = ["at_least_one", "count", "percentage", "positive", "seconds"]


def positive(text: str) -> int:
    """Return a number from 1 up. Local."""
    return _whole(text, 1)


def count(text: str) -> int:
    """Return a number from 0 up. Local."""
    return _whole(text, 0)


def seconds(text: str) -> float:
    """Return a number of seconds, more than 0; infinity is one. Local."""
    found = _number(text)
    if not found > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return found


def percentage(text: str) -> float:
    """Return a number from 0 to 100. Local."""
    found = _number(text)
    if not 0 <= found <= 100:  # noqa: PLR2004 - percent
        raise argparse.ArgumentTypeError(f"{text!r} is no percentage")
    return found


def at_least_one(text: str) -> float:
    """Return a finite number from 1 up, such as how many times as long something takes. Local."""
    found = _number(text)
    if not 1 <= found < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 up")
    return found


def _whole(text: str, least: int) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from {least} up")
    return int(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
