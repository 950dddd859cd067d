"""Types of command-line arguments: each is a function of the text that refuses what it cannot be.

``argparse`` makes the option and the text part of its error, on all commands in the same words.
"""

from __future__ import annotations

import argparse
import math

__all__ = ["at_least_one", "count", "percentage", "positive", "seconds", "text"]

_MOST_DIGITS = 18
_LONGEST = 40  # characters of a text that are repeated


def text(given: str) -> str:
    """Return a text that is not empty. Local."""
    if not given:
        raise argparse.ArgumentTypeError("there is nothing in it")
    return given


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
        raise argparse.ArgumentTypeError(f"{_brief(text)} is no number of seconds")
    return found


def percentage(text: str) -> float:
    """Return a number from 0 to 100. Local."""
    found = _number(text)
    if not 0 <= found <= 100:  # noqa: PLR2004 - percent
        raise argparse.ArgumentTypeError(f"{_brief(text)} is no percentage")
    return found


def at_least_one(text: str) -> float:
    """Return a finite number from 1 up, such as how many times as long something takes. Local."""
    found = _number(text)
    if not 1 <= found < math.inf:
        raise argparse.ArgumentTypeError(f"{_brief(text)} is no number from 1 up")
    return found


def _whole(text: str, least: int) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{_brief(text)} is no number from {least} up")
    if len(text) > _MOST_DIGITS:  # Python itself refuses thousands of them with another error
        raise argparse.ArgumentTypeError(f"{_brief(text)} is too large a number")
    if int(text) < least:
        raise argparse.ArgumentTypeError(f"{_brief(text)} is no number from {least} up")
    return int(text)


def _number(text: str) -> float:
    try:
        # Python takes digits of all scripts, and white space around them.
        return float(text) if text.isascii() and text == text.strip() else math.nan
    except ValueError:
        return math.nan


def _brief(text: str) -> str:
    return repr(text) if len(text) <= _LONGEST else f"{text[:_LONGEST]!r}..."
