"""The output of the ranks: whole lines with the rank's number, written without waiting for a reader."""

from __future__ import annotations

import contextlib
import os
import re
import select
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING

from chainer_dist.launcher import wire

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "LastWords",
    "Lines",
    "finish",
    "is_terminal",
    "keep",
    "listen",
    "one_line",
    "say",
    "start",
    "write",
]

MAX_LINE = 1 << 16  # bytes; a longer line is printed in parts
MOST_WAITING = 1 << 20  # bytes to be written, and no more are asked for
MAX_WORDS = 600  # characters of a line of the launcher's own
_N_LAST_LINES = 50  # of a rank's standard error, about a traceback

_LINE = re.compile(rb"[^\n]*\n")
# These have no traceback of their own.
_SYNTAX = re.compile(r"(Syntax|Indentation|Tab)Error: ")
# What chainer_dist.global_except_hook and MPICH say of a rank that calls MPI_Abort.
_HOOK = "chainer_dist: "
_ABORT = re.compile(r"Abort\((\d{1,10})\) on node \d+ .*application called MPI_Abort")


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
    """Finds the reason why a rank has ended in the lines of its standard error.

    It is for messages only, and decides nothing: a script may print anything.

    Attributes:
        exception: Last line of the last traceback, or "".
        aborts: Statuses with which MPICH says that the rank called MPI_Abort.
        lines: The last lines themselves.
    """

    def __init__(self) -> None:
        self.exception = ""
        self.aborts: set[int] = set()
        self.lines: deque[bytes] = deque(maxlen=_N_LAST_LINES)
        self._in_traceback = False

    def add(self, line: bytes) -> None:
        """Look at a line."""
        self.lines.append(line)
        text = line.decode(errors="replace").rstrip()
        if text.startswith("Traceback (most recent call last):"):
            self._in_traceback = True
        elif self._in_traceback and text and not text[0].isspace():
            self._in_traceback = False
            self.exception = "" if text.startswith(_HOOK) else text
        elif _SYNTAX.match(text):
            self.exception = text
        match = _ABORT.match(text)
        if match:
            self.aborts.add(int(match[1]) & 0xFF)


class _Writer:
    """Writes in a thread of its own, as a reader may stop for a while, or for ever.

    Args:
        name: Name of the output, for errors.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.has_no_reader = False
        self._has_lost = False  # whether something could not be written
        self._waiting: deque[tuple[int | Path, bytes]] = deque()
        self._n_bytes = 0  # that are not written yet
        self._changed = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    @property
    def is_full(self) -> bool:
        return self._n_bytes > MOST_WAITING

    def write(self, target: int | Path, output: bytes) -> None:
        """Have something written to a file descriptor, or appended to a file."""
        with self._changed:
            self._waiting.append((target, output))
            self._n_bytes += len(output)
            self._changed.notify_all()

    def finish(self, deadline: float) -> bool:
        """Wait until all is written; return whether it is."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._n_bytes == 0, max(0.0, deadline - time.monotonic())
            )

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                waiting = [*self._waiting]
                self._waiting.clear()
            targets: dict[int | Path, list[bytes]] = {}
            for target, output in waiting:
                targets.setdefault(target, []).append(output)
            for target, outputs in targets.items():
                output = b"".join(outputs)
                try:
                    self._write(target, output)
                except OSError as error:  # a full disk may have room again later
                    if not self._has_lost:
                        self._has_lost = True
                        say(
                            f"{self.name} cannot be written ({error.strerror}); what the ranks print is lost"
                        )
                finally:
                    with self._changed:
                        self._n_bytes -= len(output)
                        self._changed.notify_all()
            _tell_listener()

    def _write(self, target: int | Path, output: bytes) -> None:
        if isinstance(target, Path):
            with target.open("ab") as file:
                file.write(output)
            return
        # The descriptor may be shared with other programs, so that it stays one whose writes wait.
        left = memoryview(output)
        while left and not self.has_no_reader:
            select.select([], [target], [])  # another program may have made it non-blocking
            try:
                left = left[os.write(target, left[: wire.CHUNK]) :]
            except BlockingIOError:
                pass
            except BrokenPipeError:
                self.has_no_reader = True


_DESCRIPTORS = {wire.OUT: 1, wire.ERR: 2}
_FILES = b""  # the key of the writer of files
_writers: dict[bytes, _Writer] = {}
_listener: Callable[[], object] | None = None


def start() -> None:
    """From now on let threads write, so that this one never waits for a reader. Local."""
    if not _writers:
        out = _Writer("standard output")
        # Where both are one, lines stay in order.
        _writers[wire.OUT] = out
        _writers[wire.ERR] = out if os.path.sameopenfile(1, 2) else _Writer("standard error")


def listen(listener: Callable[[], object] | None) -> None:
    """Have a function called, in another thread, whenever something was written, or could not be. Local."""
    global _listener  # noqa: PLW0603 - there is one standard output
    _listener = listener


def _tell_listener() -> None:
    listener = _listener
    if listener is not None:
        with contextlib.suppress(RuntimeError):  # the loop that it belongs to is closed
            listener()


def is_full() -> bool:
    """Return whether so much waits to be written that no more should be asked for. Local."""
    return any(writer.is_full for writer in _writers.values())


def has_no_reader() -> bool:
    """Return whether the output has no reader any more. Local."""
    return any(writer.has_no_reader for writer in _writers.values())


def finish(seconds: float) -> bool:
    """Wait until all is written; return whether that was so within some seconds. Local."""
    deadline = time.monotonic() + min(seconds, threading.TIMEOUT_MAX / 2)
    done = [writer.finish(deadline) for writer in _writers.values()]
    return all(done)


def write(kind: bytes, output: bytes) -> None:
    """Print what a rank has printed, to standard output or error. Local.

    Call it after :func:`start`. It does not wait for a reader, and raises nothing where nothing can be written.
    """
    _writers[kind].write(_DESCRIPTORS[kind], output)


def keep(path: Path, output: bytes) -> None:
    """Append to a file what a rank has printed. Local.

    As :func:`write` it is to be called after :func:`start`, waits for nothing and raises nothing.
    """
    if _FILES not in _writers:
        _writers[_FILES] = _Writer(f"the files in {path.parent}")
    _writers[_FILES].write(path, output)


def is_terminal(kind: bytes) -> bool:
    """Return whether standard output, or error, of this process is a terminal. Local."""
    return os.isatty(_DESCRIPTORS[kind])


def open_closed_streams() -> None:
    """Have something to read and to write where a shell has closed standard streams. Local.

    Otherwise the next file or connection would take their numbers, and what is printed would go there.
    """
    for descriptor in range(3):
        with contextlib.suppress(OSError):
            os.fstat(descriptor)
            continue
        nothing = os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        os.set_inheritable(nothing, True)  # noqa: FBT003 - positional only


def give_up_printing() -> None:
    """Let what could not be printed to standard output vanish; Python would try again when it ends. Local."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def say(text: str) -> None:
    """Print a line of the launcher's own to standard error, if that is possible. Local."""
    line = f"chainer-dist: {one_line(text)}\n"
    if _writers:
        write(wire.ERR, line.encode(errors="backslashreplace"))
        return
    with contextlib.suppress(
        OSError, ValueError, AttributeError
    ):  # there may be nothing to write to
        sys.stderr.write(line)
        sys.stderr.flush()


def one_line(text: str) -> str:
    """Return a text with what would be no line, or control a terminal, written out, and not too long. Local."""
    text = "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)
    return (
        text
        if len(text) <= MAX_WORDS
        else f"{text[: MAX_WORDS // 2]} ... {text[-MAX_WORDS // 2 :]}"
    )
