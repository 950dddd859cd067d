"""What the launcher reports in one line instead of a traceback."""

from __future__ import annotations


class LaunchError(RuntimeError):
    """A job cannot be started, and the message says what to do about it."""
