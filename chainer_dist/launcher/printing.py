"""The lines that a rank prints are shown with the rank's number, kept in a file, or both.

Bars that are redrawn in place make no sense where several ranks write, nor in a file: a line now and then
stands for them, and what would move a cursor is left out.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from chainer_dist.launcher import output, wire

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["Format", "PlainLines", "Printer"]

SECONDS_BETWEEN_BARS = 30.0  # of one stream
SECONDS_TO_BE_REDRAWN = 0.2  # from what might be a bar to the end of it

# A bar of Chainer clears the screen below the cursor, draws itself, and moves the cursor back up.
_BAR = re.compile(rb"\x1b\[J([^\x1b]*)\x1b\[\d*A")
# Which, or another escape sequence, has not come whole yet.
_PERHAPS_A_BAR = re.compile(rb"\x1b\[J[^\x1b]*\Z|(?:\x1b\[J[^\x1b]*)?\x1b(?:\[[0-?]*)?\Z")
_MOVES = re.compile(rb"\x1b\[(?![0-9;]*m)[0-?]*[ -/]*[@-~]")
_ESCAPES = re.compile(rb"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[@-Z\\^_]")


class Format(NamedTuple):
    """How the output of all ranks is shown and kept.

    Attributes:
        prefix: Whether lines are shown with the number of their rank.
        only: The ranks whose lines are shown; None is all.
        folder: Folder in which each rank has a file of its lines; None for no files.
        width: Digits of the largest rank, for the names of the files.
    """

    prefix: bool
    only: frozenset[int] | None = None
    folder: Path | None = None
    width: int = 1


class PlainLines:
    """Cuts a stream of bytes into lines that no cursor has to move for.

    Args:
        take: Called with each line, its end included; the last one gets one if it has none.
        later: Has a function called after some seconds.
        styled: Whether colours are kept.
    """

    def __init__(
        self,
        take: Callable[[bytes], None],
        later: Callable[[float, Callable[[], None]], Any],
        *,
        styled: bool,
    ) -> None:
        self._take = take
        self._later = later
        self._hidden = _MOVES if styled else _ESCAPES
        self._rest = b""
        self._held = b""  # what may turn out to be a bar
        self._shown_at = -SECONDS_BETWEEN_BARS  # when a line last stood for a bar

    def add(self, printed: bytes) -> None:
        """Pass on the lines that are whole now."""
        printed = self._held + printed
        self._held = b""
        printed = _BAR.sub(self._stand_for, printed)
        held = _PERHAPS_A_BAR.search(printed)
        if held and len(held[0]) <= output.MAX_LINE:
            self._held, printed = held[0], printed[: held.start()]
            self._later(SECONDS_TO_BE_REDRAWN, self._let_go)
        self._split(printed)

    def end(self) -> None:
        """Pass on what has not ended yet."""
        self._let_go()
        if self._plain(self._rest):
            self._finish_line(self._rest)
        self._rest = b""

    def _let_go(self) -> None:
        """Take what was held for no bar."""
        held, self._held = self._held, b""
        self._split(held)

    def _stand_for(self, bar: re.Match[bytes]) -> bytes:
        """Return the line that stands for a bar, if it is time for one."""
        words = b" ".join(self._plain(bar[1]).split())
        return words + b"\n" if words and self._is_time() else b""

    def _split(self, printed: bytes) -> None:
        *whole, rest = (self._rest + printed).replace(b"\r\n", b"\n").split(b"\n")
        for line in whole:
            self._finish_line(line)
        *redrawn, last = rest.split(b"\r")
        if redrawn and not last:  # nothing has been drawn over the newest state yet
            last = redrawn.pop() + b"\r"
        for state in map(self._plain, redrawn):
            if state.strip() and self._is_time():
                self._take(state.rstrip() + b"\n")
        self._rest = last
        if len(last) > output.MAX_LINE:
            self._finish_line(last)
            self._rest = b""

    def _finish_line(self, line: bytes) -> None:
        """Pass on a line as a terminal would show it at its end."""
        if b"\r" in line:
            states = [each for each in map(self._plain, line.split(b"\r")) if each.strip()]
            if states:
                self._take(states[-1].rstrip() + b"\n")
        else:
            self._take(self._plain(line) + b"\n")

    def _plain(self, line: bytes) -> bytes:
        return self._hidden.sub(b"", line) if b"\x1b" in line else line

    def _is_time(self) -> bool:
        now = time.monotonic()
        if now - self._shown_at < SECONDS_BETWEEN_BARS:
            return False
        self._shown_at = now
        return True


class Printer:
    """The output of one rank.

    Args:
        number: The rank.
        how: Format of the output.
        later: Function that has another function called after some seconds.
    """

    def __init__(
        self, number: int, how: Format, later: Callable[[float, Callable[[], None]], Any]
    ) -> None:
        self.words = output.LastWords()
        self._prefix = b"[%d] " % number if how.prefix else b""
        self._is_shown = how.only is None or number in how.only
        self._file = how.folder and how.folder / f"rank.{number:0{how.width}}.log"
        if self._file:  # which may have lines of an earlier job, and keeps them
            output.keep(self._file, time.strftime("==== %Y-%m-%d %H:%M:%S\n").encode())
        self._raw = {
            kind: not how.prefix and output.is_terminal(kind) for kind in (wire.OUT, wire.ERR)
        }
        self._lines = {
            kind: PlainLines(self._taker(kind), later, styled=output.is_terminal(kind))
            for kind in (wire.OUT, wire.ERR)
        }

    def add(self, kind: bytes, printed: bytes) -> None:
        """Take what a rank has printed to standard output or error."""
        if self._is_shown and self._raw[kind]:
            output.write(kind, printed)
        self._lines[kind].add(printed)

    def end(self) -> None:
        """Print what has not ended yet."""
        for lines in self._lines.values():
            lines.end()

    def show_last_words(self) -> None:
        """Show the end of the standard error of a rank whose lines were not shown."""
        if not self._is_shown:
            for line in self.words.lines:
                output.write(wire.ERR, self._prefix + line)

    def _taker(self, kind: bytes) -> Callable[[bytes], None]:
        def take(line: bytes) -> None:
            if kind == wire.ERR:
                self.words.add(line)
            if self._is_shown and not self._raw[kind]:
                output.write(kind, self._prefix + line)
            if self._file:
                output.keep(self._file, line)

        return take
