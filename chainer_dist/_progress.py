"""Progress of long work: a bar in a terminal, and a line now and then where the output is none."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["bar", "load_tqdm"]

SECONDS_BETWEEN_LINES = 30.0


def load_tqdm() -> Any:
    """Return tqdm's progress bar. Local.

    Raises:
        ImportError: If tqdm is not installed.
    """
    try:
        import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install tqdm, or leave it out") from error
    return tqdm.tqdm


def bar(**options: Any) -> Any:
    """Return a progress bar of tqdm on standard error. Local.

    Args:
        options: Arguments of tqdm.

    Raises:
        ImportError: If tqdm is not installed.
    """
    if not sys.stderr.isatty():
        options = {
            "mininterval": SECONDS_BETWEEN_LINES,
            "maxinterval": SECONDS_BETWEEN_LINES,
            "file": _WholeLines(sys.stderr),
            **options,
        }
    return load_tqdm()(**options)


class _WholeLines:
    """A stream in which what a bar would redraw becomes a line of its own."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """Write what is to be seen of a text, if there is any."""
        words = text.strip("\r\n ")
        if words:
            self._stream.write(f"{words}\n")

    def flush(self) -> None:
        """Flush the stream."""
        self._stream.flush()
