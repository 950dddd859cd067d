"""What the ranks print: whole lines with the rank's number, and the exception that ended a rank."""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING

from chainer_dist.launch import wire

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["LastWords", "Lines", "say", "write"]

MAX_LINE = 1 << 16  # bytes; a longer line is printed in parts
MAX_WORDS = 600  # characters of a line of the launcher's own

_LINE = re.compile(rb"[^\n]*\n")
# These have no traceback of their own.
_SYNTAX = re.compile(r"(Syntax|Indentation|Tab)Error: ")
# What chainer_dist.watch says of ranks that have waited for one another for too long.
_STALL = re.compile(r"chainer_dist: ending the job, (stalled for .*)")
# What chainer_dist.global_except_hook and MPICH say of a rank that calls MPI_Abort.
_HOOK = "chainer_dist: "
_ABORT = re.compile(
    r"chainer_dist: .* ending the job with status (\d+)\.$|"
    r"Abort\((\d+)\) on node \d+ .*application called MPI_Abort"
)


class Lines:
    """Cuts a stream of bytes into lines.

    Args:
        take: Called with each line, its end included; the last one gets one if it has none.
    """

    def __init__(self, take: Callable[[bytes], None]) -> None:
        self._take = take
        self._rest = b""

    def add(self, output: bytes) -> None:
        """Pass on the lines that are whole now."""
        lines = self._rest + output
        end = lines.rfind(b"\n") + 1
        for match in _LINE.finditer(lines, 0, end):
            self._take(match[0])
        self._rest = lines[end:]
        if len(self._rest) > MAX_LINE:
            self.end()

    def end(self) -> None:
        """Pass on what has not ended yet."""
        if self._rest:
            self._take(self._rest + b"\n")
        self._rest = b""


class LastWords:
    """Finds out from the lines of standard error why a rank has ended.

    Attributes:
        exception: Last line of the last traceback, or "".
        abort: The status with which the rank aborts the job, or None.
        stall: The stall for which the rank ends the job, and is not to blame itself; or "".
    """

    def __init__(self) -> None:
        self.exception = ""
        self.abort: int | None = None
        self.stall = ""
        self._in_traceback = False

    def add(self, line: bytes) -> None:
        """Look at a line."""
        text = line.decode(errors="replace").rstrip()
        if text.startswith("Traceback (most recent call last):"):
            self._in_traceback = True
        elif self._in_traceback and text and not text[0].isspace():
            self._in_traceback = False
            self.exception = "" if text.startswith(_HOOK) else text
        elif _SYNTAX.match(text):
            self.exception = text
        match = _STALL.match(text)
        if match:
            self.stall = match[1]
        match = _ABORT.match(text)
        if match and self.abort is None:
            self.abort = int(match[1] or match[2]) & 0xFF


def write(kind: bytes, output: bytes) -> None:
    """Print what a rank has printed, to standard output or error. Local.

    Raises:
        BrokenPipeError: If nobody reads it any more.
    """
    stream = sys.stdout if kind == wire.OUT else sys.stderr
    stream.buffer.write(output)
    stream.buffer.flush()


def give_up_writing() -> None:
    """Let what is still printed vanish; Python would complain when it ends. Local."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def say(text: str) -> None:
    """Print a line of the launcher's own to standard error. Local."""
    sys.stderr.write(f"chainer-dist: {one_line(text)}\n")
    sys.stderr.flush()


def one_line(text: str) -> str:
    """Return a text with what would be no line, or control a terminal, written out, and not too long. Local."""
    text = "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)
    return (
        text
        if len(text) <= MAX_WORDS
        else f"{text[: MAX_WORDS // 2]} ... {text[-MAX_WORDS // 2 :]}"
    )
