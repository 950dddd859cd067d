"""Errors that the launcher reports in one line instead of a traceback."""

from __future__ import annotations


class LaunchError(RuntimeError):
    """A job cannot be started, or has not ended well; the message says why, and what to do about it.

    Attributes:
        status: The exit status that the launcher leaves with because of it.
    """

    status = 1
